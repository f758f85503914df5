"""Writes frames to clients: events of arrays in, protobuf columns out, in messages that stay under a size."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.columns import StreamResponse, field_head, write_column
from cellserve.v1 import stream_pb2, values_pb2
from cellserve.v1.values_pb2 import FloatBlock
from cellserve_service.messages import (
    Answers,
    Done,
    Draining,
    DurablePositions,
    Event,
    Failures,
    Opened,
    SessionEnded,
)
from cellserve_service.outputs import OutputArrays

# Bytes of an answer's columns beside its outputs: request, position, count, remaining.
ANSWER_ROW_BYTES = 24

_AnswerEvent = stream_pb2.AnswerEvent
_Outputs = values_pb2.OutputColumns
_FLOAT_BLOCKS = ("top_logprobs", "logprobs", "head_outputs", "states", "gates")


def encode_outputs(outputs: OutputArrays) -> values_pb2.OutputColumns:
    """Outputs as columns."""
    message = values_pb2.OutputColumns()
    if outputs.next_tokens is not None:
        message.next_tokens.extend(outputs.next_tokens.tolist())
    if outputs.top_tokens is not None:
        message.top_tokens.extend(outputs.top_tokens.ravel().tolist())
    for name in _FLOAT_BLOCKS:
        array = getattr(outputs, name)
        if array is not None:
            block = getattr(message, name)
            block.shape.extend(array.shape)
            block.values = write_column(array, "<f4")
    return message


def encode_event(event: Event, max_bytes: int) -> Iterator[tuple[Event, bytes]]:
    """An event for one stream as frames, each with the part of the event that it tells.

    Answers that are too large for one frame are split between their rows. Frames can be joined: what stands behind a
    frame goes on with it.
    """
    if not isinstance(event, Answers):
        response = StreamResponse()
        _add(response, event)
        yield event, response.SerializeToString()
        return
    for part in _parts(event, max_bytes):
        yield part, _answer_frames(part, 1)[0]


def encode_rows(answers: Answers) -> list[bytes]:
    """A frame for each row; all have equally many output rows."""
    return _answer_frames(answers, len(answers.requests))


def _parts(answers: Answers, max_bytes: int) -> Iterator[Answers]:
    if ANSWER_ROW_BYTES * len(answers.requests) + answers.outputs.num_bytes <= max_bytes:
        yield answers
        return
    total_rows = max(1, int(answers.num_output_rows.sum()))
    row_bytes = answers.outputs.num_bytes / total_rows
    sizes = ANSWER_ROW_BYTES + answers.num_output_rows * row_bytes
    first, used = 0, 0.0
    for row, row_size in enumerate(sizes.tolist()):
        if row > first and used + row_size > max_bytes:
            yield answers.rows(first, row)
            first, used = row, 0.0
        used += row_size
    yield answers.rows(first, len(sizes))


# What frames are put together from: bytes that all of them have, or a column with each one's bytes, (number, width).
_Piece = bytes | NDArray[np.uint8]


def _answer_frames(answers: Answers, number: int) -> list[bytes]:
    """So many frames, each with equally many rows of the answers.

    By hand, because most frames are these: the generated classes take several times as long for one, and here all
    frames of a tick are written at once.
    """
    fields = _field(_AnswerEvent.REQUESTS_FIELD_NUMBER, _column(answers.requests, "<u8", number))
    fields += _field(_AnswerEvent.POSITIONS_FIELD_NUMBER, _column(answers.positions, "<u8", number))
    if np.count_nonzero(answers.counts != 1):
        fields += _field(_AnswerEvent.COUNTS_FIELD_NUMBER, _column(answers.counts, "<u4", number))
    if np.count_nonzero(answers.remaining):
        fields += _field(_AnswerEvent.REMAINING_FIELD_NUMBER, _column(answers.remaining, "<u4", number))
    fields += _field(_AnswerEvent.OUTPUTS_FIELD_NUMBER, _output_fields(answers.outputs, number))
    event = _field(stream_pb2.Event.ANSWERS_FIELD_NUMBER, fields)
    return _put_together(_field(stream_pb2.StreamResponse.EVENTS_FIELD_NUMBER, event), number)


def _output_fields(outputs: OutputArrays, number: int) -> list[_Piece]:
    fields: list[_Piece] = []
    for name, field in (
        ("next_tokens", _Outputs.NEXT_TOKENS_FIELD_NUMBER),
        ("top_tokens", _Outputs.TOP_TOKENS_FIELD_NUMBER),
    ):
        array = getattr(outputs, name)
        if array is not None:
            fields += _field(field, _column(array, "<u4", number))
    if not outputs.has_floats:
        return fields
    for name in _FLOAT_BLOCKS:
        array = getattr(outputs, name)
        if array is not None:
            shape = FloatBlock(shape=(len(array) // number, *array.shape[1:])).SerializeToString()
            block = [shape, *_field(FloatBlock.VALUES_FIELD_NUMBER, _column(array, "<f4", number))]
            fields += _field(_Outputs.DESCRIPTOR.fields_by_name[name].number, block)
    return fields


def _column(numbers: NDArray[Any], dtype: str, number: int) -> list[_Piece]:
    encoded = write_column(numbers, dtype)
    return [encoded if number == 1 else np.frombuffer(encoded, np.uint8).reshape(number, len(encoded) // number)]


def _field(number: int, pieces: list[_Piece]) -> list[_Piece]:
    """A field of frames that has these pieces for content."""
    return [field_head(number, sum([_width(piece) for piece in pieces])), *pieces]


def _width(piece: _Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.shape[1]


def _put_together(pieces: list[_Piece], number: int) -> list[bytes]:
    if number == 1:
        return [b"".join([piece for piece in pieces if isinstance(piece, bytes)])]
    width = sum([_width(piece) for piece in pieces])
    frames = np.empty((number, width), np.uint8)
    first = 0
    for piece in pieces:
        end = first + _width(piece)
        frames[:, first:end] = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece
        first = end
    data = frames.tobytes()
    return [data[first : first + width] for first in range(0, len(data), width)]


def _add(response: Any, event: Event) -> None:
    added = response.events.add()
    match event:
        case Failures():
            failures, refusals = added.failures, event.refusals
            failures.requests = write_column(event.requests, "<u8")
            failures.codes = write_column(np.array([refusal.code for refusal in refusals]), "<u4")
            failures.reasons.extend([refusal.reason for refusal in refusals])
            failures.positions = write_column(np.array([refusal.position for refusal in refusals]), "<u8")
            delays = np.array([refusal.retry_after_milliseconds for refusal in refusals])
            failures.retry_after_milliseconds = write_column(delays, "<u4")
            failures.messages.extend([refusal.message for refusal in refusals])
        case Opened():
            opened = added.opened
            opened.requests = write_column(event.requests, "<u8")
            opened.session_ids.extend(event.session_ids)
            opened.handles = write_column(event.handles, "<u8")
            opened.positions = write_column(event.positions, "<u8")
            opened.epochs = write_column(event.epochs, "<u8")
            opened.created.extend(event.created.tolist())
            if event.durable_positions is not None:
                opened.durable_positions = write_column(event.durable_positions, "<u8")
            opened.durabilities.extend(event.durabilities.tolist())
        case Done():
            done = added.done
            done.requests = write_column(event.requests, "<u8")
            done.handles = write_column(event.handles, "<u8")
            done.epochs = write_column(event.epochs, "<u8")
        case DurablePositions():
            added.durable.handles = write_column(event.handles, "<u8")
            added.durable.positions = write_column(event.positions, "<u8")
        case SessionEnded():
            added.ended.handles = write_column(event.handles, "<u8")
            added.ended.reasons.extend([event.reason] * len(event.handles))
        case Draining():
            added.draining.timeout_milliseconds = int(1000 * event.timeout_seconds)
        case _:
            raise AssertionError(f"{type(event).__name__} is no event of a stream")
