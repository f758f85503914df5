"""Writes frames to clients: events of arrays in, protobuf columns out, in messages that stay under a size."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cellserve.columns import StreamResponse, write_column, write_field
from cellserve.v1 import stream_pb2, values_pb2
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
EVENT_ROW_BYTES = 64
DURABLE_ROW_BYTES = 16

_AnswerEvent = stream_pb2.AnswerEvent
_Outputs = values_pb2.OutputColumns


def encode_outputs(outputs: OutputArrays) -> values_pb2.OutputColumns:
    """Outputs as columns."""
    message = values_pb2.OutputColumns()
    if outputs.next_tokens is not None:
        message.next_tokens.extend(outputs.next_tokens.tolist())
    if outputs.top_tokens is not None:
        message.top_tokens.extend(outputs.top_tokens.ravel().tolist())
    _add_float_blocks(message, outputs)
    return message


def _outputs_bytes(outputs: OutputArrays) -> bytes:
    """The same message as bytes, without its objects."""
    fields = b""
    if outputs.next_tokens is not None:
        fields = write_field(_Outputs.NEXT_TOKENS_FIELD_NUMBER, write_column(outputs.next_tokens, "<u4"))
    if outputs.top_tokens is not None:
        fields += write_field(_Outputs.TOP_TOKENS_FIELD_NUMBER, write_column(outputs.top_tokens, "<u4"))
    if not outputs.has_floats:
        return fields
    blocks = _Outputs()
    _add_float_blocks(blocks, outputs)
    return fields + blocks.SerializeToString()


def _add_float_blocks(columns: values_pb2.OutputColumns, outputs: OutputArrays) -> None:
    for name in ("top_logprobs", "logprobs", "head_outputs", "states", "gates"):
        array = getattr(outputs, name)
        if array is not None:
            block = getattr(columns, name)
            block.shape.extend(array.shape)
            block.values = np.ascontiguousarray(array, "<f4").tobytes()


def event_bytes(event: Event) -> int:
    """Bytes that an event takes on the wire, nearly: what a slow reader leaves unsent."""
    if isinstance(event, Answers):
        return ANSWER_ROW_BYTES * len(event.requests) + event.outputs.num_bytes
    if isinstance(event, Failures | Opened | Done):
        return EVENT_ROW_BYTES * len(event.requests)
    if isinstance(event, DurablePositions):
        return DURABLE_ROW_BYTES * len(event.handles)
    return EVENT_ROW_BYTES


def encode_events(events: Sequence[Event], num_bytes: int, max_bytes: int) -> Iterator[bytes]:
    """Frames for one stream, in order; answers that are too large for one frame are split between their rows.

    num_bytes: of all events, as event_bytes tells.
    """
    if num_bytes <= max_bytes:
        if events:
            yield b"".join([_encode(event) for event in events])
        return
    encoded: list[bytes] = []
    size = 0
    for event in events:
        for part, part_bytes in _parts(event, max_bytes):
            if encoded and size + part_bytes > max_bytes:
                yield b"".join(encoded)
                encoded, size = [], 0
            encoded.append(_encode(part))
            size += part_bytes
    if encoded:
        yield b"".join(encoded)


def _parts(event: Event, max_bytes: int) -> Iterator[tuple[Event, int]]:
    num_bytes = event_bytes(event)
    if not isinstance(event, Answers) or num_bytes <= max_bytes:
        yield event, num_bytes
        return
    total_rows = max(1, int(event.num_output_rows.sum()))
    row_bytes = event.outputs.num_bytes / total_rows
    sizes = ANSWER_ROW_BYTES + event.num_output_rows * row_bytes
    first, used = 0, 0.0
    for row, row_size in enumerate(sizes.tolist()):
        if row > first and used + row_size > max_bytes:
            part = event.rows(first, row)
            yield part, event_bytes(part)
            first, used = row, 0.0
        used += row_size
    part = event.rows(first, len(sizes))
    yield part, event_bytes(part)


def _encode(event: Event) -> bytes:
    """A frame with this event alone: what is appended to a frame goes on with it."""
    if isinstance(event, Answers):
        return _answers_frame(event)
    response = StreamResponse()
    _add(response, event)
    frame: bytes = response.SerializeToString()
    return frame


def _answers_frame(answers: Answers) -> bytes:
    """By hand, because most frames are this: the generated classes take several times as long."""
    fields = [
        write_field(_AnswerEvent.REQUESTS_FIELD_NUMBER, write_column(answers.requests, "<u8")),
        write_field(_AnswerEvent.POSITIONS_FIELD_NUMBER, write_column(answers.positions, "<u8")),
    ]
    if np.count_nonzero(answers.counts != 1):
        fields.append(write_field(_AnswerEvent.COUNTS_FIELD_NUMBER, write_column(answers.counts, "<u4")))
    if np.count_nonzero(answers.remaining):
        fields.append(write_field(_AnswerEvent.REMAINING_FIELD_NUMBER, write_column(answers.remaining, "<u4")))
    fields.append(write_field(_AnswerEvent.OUTPUTS_FIELD_NUMBER, _outputs_bytes(answers.outputs)))
    event = write_field(stream_pb2.Event.ANSWERS_FIELD_NUMBER, b"".join(fields))
    return write_field(stream_pb2.StreamResponse.EVENTS_FIELD_NUMBER, event)


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
