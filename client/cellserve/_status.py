"""Turns what gRPC tells about a failure into an exception of this library.

Unary calls carry a google.rpc.Status in `grpc-status-details-bin`; on the stream the same facts are columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio

from cellserve.errors import (
    AccessDenied,
    CellserveError,
    ConnectionLost,
    InvalidInput,
    MessageTooLarge,
    NotFound,
    PositionError,
    SessionLost,
    TimedOut,
    TokensLost,
    Unavailable,
    Unimplemented,
)
from cellserve.v1.errors_pb2 import ErrorReason

__all__ = [
    "CLASS_BY_REASON",
    "TOKENS_LOST",
    "code_name",
    "connection_error",
    "event_error",
    "is_passing",
    "lost_error",
    "make_error",
    "reason_name",
    "status_error",
]

# Why a session is lost, beside the server's reasons: it cannot be made whole.
TOKENS_LOST: Final = "TOKENS_LOST"

_DOMAIN: Final = "cellserve"
_DETAILS_KEY: Final = "grpc-status-details-bin"
_REASON_PREFIX: Final = "ERROR_REASON_"
_CODE_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}

# Every one of these has been seen for the same event, a server that went away.
_CONNECTION_CODES: Final = frozenset({"OK", "CANCELLED", "UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED"})
# What a server says of a request, for good; whatever else ends a stream is no word of its own.
_REFUSAL_CODES: Final = frozenset(
    {"INVALID_ARGUMENT", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNIMPLEMENTED"}
)
# Another server, or the same one a little later, will do what was asked.
_PASSING_REASONS: Final = frozenset({"DRAINING", "ENGINE_FAILED", "STORE_UNAVAILABLE"})


def _subclasses(kind: type[CellserveError]) -> Iterator[type[CellserveError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


CLASS_BY_REASON: Final = {kind.reason: kind for kind in _subclasses(CellserveError) if kind.reason is not None}

# For failures without a reason of ours: gRPC's own, a proxy's, a server's that is no cellserve.
CLASS_BY_CODE: Final[Mapping[str, type[CellserveError]]] = {
    "CANCELLED": Unavailable,
    "DEADLINE_EXCEEDED": TimedOut,
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": NotFound,
    "PERMISSION_DENIED": AccessDenied,
    "RESOURCE_EXHAUSTED": MessageTooLarge,
    "UNAUTHENTICATED": AccessDenied,
    "UNAVAILABLE": Unavailable,
    "UNIMPLEMENTED": Unimplemented,
}


def is_passing(error: CellserveError) -> bool:
    """Whether the same request can succeed a little later: a connection that broke, a server that stops or waits."""
    if isinstance(error, ConnectionLost):
        return True
    return error.reason in _PASSING_REASONS if error.reason is not None else error.code in _CONNECTION_CODES


def lost_error(reason: str, session_id: str) -> CellserveError:
    """The exception for the use of a session that has ended, or is somebody else's by now."""
    kind = TokensLost if reason == TOKENS_LOST else CLASS_BY_REASON.get(reason, SessionLost)
    return kind(f"session {session_id!r} can no longer be used here: {reason}", session_id=session_id)


def make_error(
    reason: str | None,
    code: str,
    message: str,
    *,
    position: int | None = None,
    retry_after_seconds: float | None = None,
    session_id: str | None = None,
    field: str | None = None,
) -> CellserveError:
    """The exception for what a server said. An unknown reason falls back on the class of the code."""
    kind = CLASS_BY_REASON.get(reason or "") or CLASS_BY_CODE.get(code, CellserveError)
    error = kind(message, session_id=session_id, code=code)
    error.position = position
    error.retry_after_seconds = retry_after_seconds
    error.field = field
    error.reason = reason
    return error


def code_name(code: int) -> str:
    """The name of a google.rpc.Code; "UNKNOWN" for a number that is none."""
    return _CODE_NAMES.get(code, "UNKNOWN")


def reason_name(reason: int) -> str | None:
    """The name of an ErrorReason without its prefix; None for one not set, or that only newer servers know."""
    if reason == ErrorReason.ERROR_REASON_UNSPECIFIED or reason not in ErrorReason.values():
        return None
    return ErrorReason.Name(ErrorReason.ValueType(reason)).removeprefix(_REASON_PREFIX)


def status_error(error: aio.AioRpcError, session_id: str | None = None) -> CellserveError:
    """The exception for a unary call, or a Generate, that failed."""
    code = error.code().name
    details = _status_details(error)
    reason: str | None = None
    position: int | None = None
    retry_after_seconds: float | None = None
    field: str | None = None
    for detail in details.details:
        info, retry, bad_request = ErrorInfo(), RetryInfo(), BadRequest()
        if detail.Unpack(info) and info.domain == _DOMAIN:
            reason = info.reason
            told = info.metadata.get("position", "")
            position = int(told) if told.isdecimal() else None
        elif detail.Unpack(retry):
            retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
    return make_error(
        reason,
        code,
        details.message or error.details() or code,
        position=position,
        retry_after_seconds=retry_after_seconds,
        session_id=session_id,
        field=field,
    )


def connection_error(
    code: str, details: str | None, *, in_doubt: bool = False, session_id: str | None = None
) -> CellserveError:
    """The exception for one who waited on a stream that ended.

    in_doubt: whether the request had been sent, so that it may have taken effect.
    """
    said = f"{code}: {details}" if details else code
    message = f"the stream to the server ended ({said})"
    if code in _REFUSAL_CODES:
        return make_error(None, code, message, session_id=session_id)
    if in_doubt:
        message += "; whether the request took effect is in doubt, and repeating it is safe"
    return ConnectionLost(message, in_doubt=in_doubt, session_id=session_id)


def event_error(code: int, reason: int, position: int, retry_after_milliseconds: int, message: str) -> CellserveError:
    """The exception for one row of a failure event."""
    error = make_error(reason_name(reason), code_name(code), message)
    if isinstance(error, PositionError):
        error.position = position
    if retry_after_milliseconds:
        error.retry_after_seconds = retry_after_milliseconds / 1000
    return error


def _status_details(error: aio.AioRpcError) -> Status:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                break  # a proxy's own idea of details; code and message still say what happened
    return Status()
