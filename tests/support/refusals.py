"""What a refusal says, the same for a row of a FailureEvent and for the status of a call."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import FailureEvent

__all__ = ["CODES", "Refused", "expect", "of_call", "of_error", "of_rows"]

# DESIGN.md section 5, transcribed once more: the code of every reason.
CODES = {
    "SESSION_NOT_FOUND": "NOT_FOUND",
    "MODEL_NOT_FOUND": "NOT_FOUND",
    "SESSION_EXPIRED": "NOT_FOUND",
    "SESSION_EVICTED": "NOT_FOUND",
    "SESSION_CLOSED": "NOT_FOUND",
    "STALE_HANDLE": "NOT_FOUND",
    "SESSION_EXISTS": "ALREADY_EXISTS",
    "INVALID_INPUT": "INVALID_ARGUMENT",
    "OUTPUT_UNSUPPORTED": "INVALID_ARGUMENT",
    "POSITION_GAP": "FAILED_PRECONDITION",
    "POSITION_CONFLICT": "FAILED_PRECONDITION",
    "ANSWER_NOT_HELD": "ABORTED",
    "STATE_MISMATCH": "FAILED_PRECONDITION",
    "NO_STORE": "FAILED_PRECONDITION",
    "SESSION_MOVED": "ABORTED",
    "SESSION_BUSY": "FAILED_PRECONDITION",
    "CHECKPOINT_NOT_FOUND": "NOT_FOUND",
    "SESSION_LIMIT": "RESOURCE_EXHAUSTED",
    "QUEUE_FULL": "RESOURCE_EXHAUSTED",
    "STORE_UNAVAILABLE": "UNAVAILABLE",
    "STATE_DAMAGED": "DATA_LOSS",
    "DRAINING": "UNAVAILABLE",
    "RUN_CANCELLED": "CANCELLED",
    "RUN_TIMED_OUT": "DEADLINE_EXCEEDED",
}
WITH_RETRY_DELAY = {"SESSION_LIMIT", "QUEUE_FULL", "STORE_UNAVAILABLE"}
MAY_HAVE_RETRY_DELAY = WITH_RETRY_DELAY | {"DRAINING"}


@dataclass(frozen=True)
class Refused:
    """Code and reason by name. position and retry_after_milliseconds are 0, and fields empty, where not told."""

    code: str
    reason: str
    position: int
    retry_after_milliseconds: int
    message: str
    fields: tuple[str, ...] = ()


def expect(refused: Refused, reason: str, *, position: int = 0, field: str | None = None) -> None:
    """The refusal is this one, with everything that the contract says of it. field: of a unary call."""
    assert (refused.code, refused.reason) == (CODES[reason], reason), refused
    assert refused.position == position, refused
    if reason in WITH_RETRY_DELAY or reason not in MAY_HAVE_RETRY_DELAY:
        assert bool(refused.retry_after_milliseconds) == (reason in WITH_RETRY_DELAY), refused
    if field is not None:
        assert refused.fields == (field,), refused
    # Written for people, who have no use for our insides.
    assert 8 <= len(refused.message) < 400, refused
    assert "Traceback" not in refused.message, refused
    assert ".py" not in refused.message, refused


def of_rows(event: FailureEvent) -> Iterable[tuple[int, Refused]]:
    """(request, refusal) of every row."""
    rows = zip(
        event.requests,
        event.codes,
        event.reasons,
        event.positions,
        event.retry_after_milliseconds,
        event.messages,
        strict=True,
    )
    for request, code, reason, position, retry, message in rows:
        name = ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
        yield request, Refused(Code.Name(code), name, position, retry, message)


def of_error(error: grpc.RpcError) -> Refused:
    """The status of a call that ended: gRPC's own have an empty reason."""
    assert isinstance(error, grpc.Call)
    code, message = error.code().name, error.details() or ""
    trailers = {item.key: item.value for item in error.trailing_metadata() or ()}
    packed = trailers.get("grpc-status-details-bin")
    if packed is None:
        return Refused(code, "", 0, 0, message)
    assert isinstance(packed, bytes)
    status = Status.FromString(packed)
    assert (Code.Name(status.code), status.message) == (code, message)
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        assert any(detail.Unpack(known) for known in (info, bad, retry)), f"an unknown detail: {detail}"
    assert info.domain == "cellserve"
    return Refused(
        code,
        info.reason,
        int(info.metadata.get("position", "0")),
        retry.retry_delay.ToMilliseconds(),
        message,
        tuple(violation.field for violation in bad.field_violations),
    )


def of_call(call: Callable[[], object]) -> Refused:
    """Make a call that must be refused; a stream of responses is read to its end."""
    try:
        answer = call()
        if isinstance(answer, grpc.Call):
            list(answer)  # type: ignore[call-overload]
    except grpc.RpcError as error:
        return of_error(error)
    raise AssertionError(f"the call was not refused: {answer}")
