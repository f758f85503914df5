"""Reads frames from clients: protobuf columns in, commands of arrays out. A bad command becomes failures in-band."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from cellserve.columns import StreamRequest, read_column
from cellserve.v1 import stream_pb2, values_pb2
from cellserve_service.errors import Refusal, invalid
from cellserve_service.messages import (
    Acknowledge,
    CancelRuns,
    CloseSessions,
    DetachSessions,
    Failures,
    InitialState,
    OpenSessions,
    ResetSessions,
    SessionTarget,
    StreamCommand,
    SubmitRuns,
    U64Array,
)
from cellserve_service.outputs import NO_OUTPUTS, At, OutputSpec
from cellserve_service.state_format import MAX_POSITION, decode_state
from cellserve_service.stepping import FloatArray, IntArray

_AT = {
    values_pb2.OutputAt.OUTPUT_AT_UNSPECIFIED: At.NONE,
    values_pb2.OutputAt.OUTPUT_AT_NONE: At.NONE,
    values_pb2.OutputAt.OUTPUT_AT_LAST: At.LAST,
    values_pb2.OutputAt.OUTPUT_AT_EVERY: At.EVERY,
}


def decode_frame(stream: int, frame: bytes, max_open_sessions: int) -> Iterator[StreamCommand | Failures]:
    """The commands of a frame, in order; Failures stand for what could not be read."""
    try:
        request = StreamRequest.FromString(frame)
    except DecodeError:
        yield _failures(stream, [0], invalid("the frame is no cellserve.v1.StreamRequest"))
        return
    for command in request.commands:
        kind = command.WhichOneof("command")
        if kind is None:
            yield _failures(stream, [0], invalid("a command of the frame is of no kind known here"))
            continue
        columns = getattr(command, kind)
        try:
            yield from _DECODERS[kind](stream, columns, max_open_sessions)
        except Refusal as refusal:
            known = getattr(columns, "requests", b"")
            requests = read_column(known[: len(known) // 8 * 8], "<u8").tolist()
            yield _failures(stream, requests or [0], refusal)


def decode_outputs(request: values_pb2.OutputRequest) -> OutputSpec:
    """What a run asks for. Raises Refusal."""
    at = _AT.get(request.at)
    if at is None:
        raise invalid(f"outputs.at {request.at} is not known here", "outputs.at")
    if at is At.NONE:
        return NO_OUTPUTS
    return OutputSpec(
        at=at,
        next_token=request.next_token,
        top_k=request.top_k,
        logprobs=request.logprobs,
        head_outputs=request.head_outputs,
        states=request.states,
        gates=request.gates,
    )


@functools.lru_cache(maxsize=256)
def _known_outputs(encoded: bytes) -> OutputSpec:
    """The same for the bytes of the request: most ask for what others have asked for before."""
    return decode_outputs(values_pb2.OutputRequest.FromString(encoded))


def decode_vectors(block: values_pb2.FloatBlock, num_tokens: int | None, field: str) -> FloatArray:
    """Vectors of a float block: (N, I). Raises Refusal."""
    shape = tuple(block.shape)
    if len(shape) != 2 or 4 * shape[0] * shape[1] != len(block.values):
        raise invalid(f"vectors of shape {shape} do not fit their {len(block.values)} bytes", field)
    if num_tokens is not None and shape[0] != num_tokens:
        raise invalid(f"there are {shape[0]} vectors for {num_tokens} tokens", field)
    return np.frombuffer(block.values, "<f4").astype(np.float32, copy=False).reshape(shape)


def _runs(stream: int, columns: Any, _: int) -> Iterator[StreamCommand | Failures]:
    requests = _requests(columns.requests)
    number = len(requests)
    told_counts = _optional(columns.counts, "<u4", number, "counts")
    counts = np.ones(number, np.int64) if told_counts is None else told_counts.astype(np.int64)
    tokens, vectors = None, None
    num_tokens = number if told_counts is None else int(counts.sum())
    if columns.HasField("vectors"):
        vectors = decode_vectors(columns.vectors, num_tokens, "vectors")
    else:
        tokens = _numbers(columns.tokens, "<u4", "tokens")
        if len(tokens) != num_tokens:
            raise invalid(f"there are {len(tokens)} tokens for counts that sum to {num_tokens}", "tokens")
    positions = _positions(columns.positions, number, "positions")
    timeouts = _optional(columns.timeouts_milliseconds, "<u4", number, "timeouts_milliseconds")
    yield SubmitRuns(
        streams=np.full(number, stream),
        requests=requests,
        handles=_column(columns.handles, "<u8", number, "handles"),
        session_ids=None,
        counts=counts,
        tokens=tokens,
        vectors=vectors,
        positions=positions,
        timeouts_seconds=None if timeouts is None else timeouts / 1000.0,
        acknowledged=_positions(columns.acknowledged_positions, number, "acknowledged_positions"),
        outputs=_known_outputs(columns.outputs.SerializeToString()),
    )


def _open(stream: int, columns: Any, max_open_sessions: int) -> Iterator[StreamCommand | Failures]:
    requests = _requests(columns.requests)
    if len(requests) > max_open_sessions:
        raise invalid(f"{len(requests)} sessions in one command; at most {max_open_sessions}", "requests")
    session_ids = list(columns.session_ids) or None
    if session_ids is not None and len(session_ids) != len(requests):
        raise invalid(f"there are {len(session_ids)} session ids for {len(requests)} requests", "session_ids")
    if session_ids is None and columns.mode == stream_pb2.OpenMode.OPEN_MODE_ATTACH:
        raise invalid("attaching needs session ids", "session_ids")
    holders = _optional(columns.holders, "<u8", len(requests), "holders")
    states: list[InitialState] | None = None
    if columns.states:
        if len(columns.states) != len(requests):
            raise invalid(f"there are {len(columns.states)} states for {len(requests)} requests", "states")
        decoded = [decode_state(state) for state in columns.states]
        bad = {place: state for place, state in enumerate(decoded) if isinstance(state, Refusal)}
        for place, refusal in bad.items():
            yield _failures(stream, [int(requests[place])], refusal)
        if bad:
            kept = [place for place in range(len(requests)) if place not in bad]
            requests = requests[np.array(kept, np.int64)]
            holders = None if holders is None else holders[np.array(kept, np.int64)]
            session_ids = None if session_ids is None else [session_ids[place] for place in kept]
        states = [state for state in decoded if isinstance(state, InitialState)]
        if not states:
            return
    yield OpenSessions(
        stream=stream,
        requests=requests,
        model=columns.model,
        session_ids=session_ids,
        mode=columns.mode,
        durability=columns.durability,
        states=states,
        holders=holders,
    )


def _reset(stream: int, columns: Any, _: int) -> Iterator[StreamCommand]:
    yield ResetSessions(_target(stream, columns))


def _close(stream: int, columns: Any, _: int) -> Iterator[StreamCommand]:
    yield CloseSessions(_target(stream, columns))


def _detach(stream: int, columns: Any, _: int) -> Iterator[StreamCommand]:
    yield DetachSessions(_target(stream, columns))


def _cancel(stream: int, columns: Any, _: int) -> Iterator[StreamCommand]:
    yield CancelRuns(stream, _numbers(columns.runs, "<u8", "runs"))


def _acknowledge(stream: int, columns: Any, _: int) -> Iterator[StreamCommand]:
    handles = _numbers(columns.handles, "<u8", "handles")
    positions = _positions(columns.positions, len(handles), "positions")
    if positions is not None:
        yield Acknowledge(stream, handles, positions)


_DECODERS: dict[str, Any] = {
    "open": _open,
    "run": _runs,
    "reset": _reset,
    "close": _close,
    "cancel": _cancel,
    "acknowledge": _acknowledge,
    "detach": _detach,
}


def _target(stream: int, columns: Any) -> SessionTarget:
    requests = _requests(columns.requests)
    return SessionTarget(stream, requests, _column(columns.handles, "<u8", len(requests), "handles"))


def _requests(column: bytes) -> U64Array:
    requests = _numbers(column, "<u8", "requests")
    if not len(requests):
        raise invalid("the command has no rows", "requests")
    if np.count_nonzero(requests) < len(requests):
        raise invalid("request numbers begin at 1", "requests")
    return requests


def _numbers(column: bytes, dtype: str, field: str) -> NDArray[Any]:
    try:
        return read_column(column, dtype)
    except ValueError:
        raise invalid(f"column {field} is cut off", field) from None


def _column(column: bytes, dtype: str, number: int, field: str) -> NDArray[Any]:
    numbers = _numbers(column, dtype, field)
    if len(numbers) != number:
        raise invalid(f"column {field} has {len(numbers)} rows for {number} requests", field)
    return numbers


def _optional(column: bytes, dtype: str, number: int, field: str) -> NDArray[Any] | None:
    return _column(column, dtype, number, field) if column else None


def _positions(column: bytes, number: int, field: str) -> IntArray | None:
    positions = _optional(column, "<u8", number, field)
    if positions is None:
        return None
    if np.count_nonzero(positions > MAX_POSITION):
        raise invalid(f"a position is out of range: at most {MAX_POSITION}", field)
    return positions.view("<i8")


def _failures(stream: int, requests: Iterable[int], refusal: Refusal) -> Failures:
    column = np.fromiter(requests, np.uint64)
    return Failures(stream, column, (refusal,) * len(column))
