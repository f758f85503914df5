"""Writes frames to clients: events of arrays in, protobuf columns out, in messages that stay under a size."""

from collections.abc import Iterator, Sequence

import numpy as np

from cellserve.v1 import stream_pb2, values_pb2
from cellserve_service.messages import (
    Answers,
    Done,
    Draining,
    Event,
    Failures,
    Opened,
    SessionEnded,
)
from cellserve_service.outputs import OutputArrays

# Bytes of an answer's columns beside its outputs: request, position, count, remaining.
ANSWER_ROW_BYTES = 24
EVENT_ROW_BYTES = 64


def encode_outputs(outputs: OutputArrays) -> values_pb2.OutputColumns:
    """Outputs as columns."""
    message = values_pb2.OutputColumns()
    if outputs.next_tokens is not None:
        message.next_tokens.extend(outputs.next_tokens.tolist())
    if outputs.top_tokens is not None:
        message.top_tokens.extend(outputs.top_tokens.ravel().tolist())
    for name in ("top_logprobs", "logprobs", "head_outputs", "states", "gates"):
        array = getattr(outputs, name)
        if array is not None:
            block = getattr(message, name)
            block.shape.extend(array.shape)
            block.values = np.ascontiguousarray(array, "<f4").tobytes()
    return message


def output_bytes(outputs: OutputArrays) -> int:
    """Bytes that the outputs take, nearly."""
    return sum(
        array.nbytes
        for array in (
            outputs.next_tokens,
            outputs.top_tokens,
            outputs.top_logprobs,
            outputs.logprobs,
            outputs.head_outputs,
            outputs.states,
            outputs.gates,
        )
        if array is not None
    )


def event_bytes(event: Event) -> int:
    """Bytes that an event takes on the wire, nearly: what a slow reader leaves unsent."""
    if isinstance(event, Answers):
        return ANSWER_ROW_BYTES * len(event.requests) + output_bytes(event.outputs)
    if isinstance(event, Failures | Opened | Done):
        return EVENT_ROW_BYTES * len(event.requests)
    return EVENT_ROW_BYTES


def encode_events(events: Sequence[Event], max_bytes: int) -> Iterator[bytes]:
    """Frames for one stream, in order; answers that are too large for one frame are split between their rows."""
    response = stream_pb2.StreamResponse()
    size = 0
    for event in events:
        for part in _parts(event, max_bytes):
            part_bytes = event_bytes(part)
            if size and size + part_bytes > max_bytes:
                yield response.SerializeToString()
                response = stream_pb2.StreamResponse()
                size = 0
            _add(response, part)
            size += part_bytes
    if size:
        yield response.SerializeToString()


def _parts(event: Event, max_bytes: int) -> Iterator[Event]:
    if not isinstance(event, Answers) or event_bytes(event) <= max_bytes:
        yield event
        return
    total_rows = max(1, int(event.num_output_rows.sum()))
    row_bytes = output_bytes(event.outputs) / total_rows
    sizes = ANSWER_ROW_BYTES + event.num_output_rows * row_bytes
    first, used = 0, 0.0
    for row, row_size in enumerate(sizes.tolist()):
        if row > first and used + row_size > max_bytes:
            yield event.rows(first, row)
            first, used = row, 0.0
        used += row_size
    yield event.rows(first, len(sizes))


def _add(response: stream_pb2.StreamResponse, event: Event) -> None:
    added = response.events.add()
    match event:
        case Answers():
            answers = added.answers
            answers.requests.extend(event.requests.tolist())
            answers.positions.extend(event.positions.tolist())
            if (event.counts != 1).any():
                answers.counts.extend(event.counts.tolist())
            if event.remaining.any():
                answers.remaining.extend(event.remaining.tolist())
            answers.outputs.CopyFrom(encode_outputs(event.outputs))
        case Failures():
            failures = added.failures
            failures.requests.extend(event.requests.tolist())
            failures.codes.extend([refusal.code for refusal in event.refusals])
            failures.reasons.extend([refusal.reason for refusal in event.refusals])
            failures.positions.extend([refusal.position for refusal in event.refusals])
            failures.retry_after_milliseconds.extend([refusal.retry_after_milliseconds for refusal in event.refusals])
            failures.messages.extend([refusal.message for refusal in event.refusals])
        case Opened():
            opened = added.opened
            opened.requests.extend(event.requests.tolist())
            opened.session_ids.extend(event.session_ids)
            opened.handles.extend(event.handles.tolist())
            opened.positions.extend(event.positions.tolist())
            opened.epochs.extend(event.epochs.tolist())
            opened.created.extend(event.created.tolist())
        case Done():
            done = added.done
            done.requests.extend(event.requests.tolist())
            done.handles.extend(event.handles.tolist())
            done.epochs.extend(event.epochs.tolist())
        case SessionEnded():
            added.ended.handles.extend(event.handles.tolist())
            added.ended.reasons.extend([event.reason] * len(event.handles))
        case Draining():
            added.draining.timeout_milliseconds = int(1000 * event.timeout_seconds)
        case _:
            raise AssertionError(f"{type(event).__name__} is no event of a stream")
