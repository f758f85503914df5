"""The exceptions of the client: one for each reason a server can refuse a request for, and those of the wire.

CellserveError
|-- InvalidInput                 also a ValueError: token out of range, wrong shape, not finite, empty run
|   `-- OutputUnsupported        the model does not have this output
|-- NotFound
|   |-- SessionNotFound          never was, or is forgotten
|   |-- ModelNotFound
|   `-- CheckpointNotFound
|-- SessionLost                  this session object is of no more use; open the session again
|   |-- SessionExpired           idle for too long
|   |-- SessionEvicted           ended by the server or an operator, for room
|   |-- SessionClosed            ended by a client
|   |-- SessionMoved             taken over by another stream or server: final, never fought over
|   |-- StaleHandle              its epoch changed behind our back, by a reset or import of somebody else
|   `-- TokensLost               the server came back without tokens that this client no longer has
|-- SessionExists                the id is taken
|-- SessionBusy                  a generate is under way
|-- PositionError                `position` says where the session stands
|   |-- PositionGap              the run begins ahead of the session
|   |-- PositionConflict         other tokens have run at this position
|   `-- AnswerNotHeld            it has run; its answer is gone
|-- StateMismatch                the state is of another model, shape, or damaged
|-- StateDamaged                 the stored row of the session is damaged
|-- NoStore                      durability asked of a server without a state store
|-- ResourceExhausted            `retry_after_seconds` says when a repeat can succeed
|   |-- SessionLimit
|   |-- NoFreeSlot
|   |-- QueueFull
|   |-- QuotaExceeded
|   `-- MessageTooLarge          gRPC's own; no retry delay
|-- Unavailable                  for the whole of the call's timeout: the client has tried again until then
|   |-- StoreUnavailable         also: the tokens not yet safe in the store are as many as this client keeps
|   |-- Draining                 the server stops soon
|   `-- ConnectionLost           `in_doubt` says whether the request may have taken effect
|-- TimedOut                     also a TimeoutError: this client gave up waiting
|   `-- RunTimedOut              surely not run
|-- RunCancelled                 surely not run
|-- EngineFailed                 the server's device failed, and it is ending
|-- AccessDenied                 credentials missing or not enough
|-- Unimplemented                the server does not know this call
|-- StepManyFailed               some sessions of a step_many failed; it holds the answers of the others
`-- ClosedError                  also a RuntimeError: this object was closed or detached by its own user
"""

# ruff: noqa: N818  (the names say what happened, as those of the reasons do)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellserve._results import StepManyResult

__all__ = [
    "AccessDenied",
    "AnswerNotHeld",
    "CellserveError",
    "CheckpointNotFound",
    "ClosedError",
    "ConnectionLost",
    "Draining",
    "EngineFailed",
    "InvalidInput",
    "MessageTooLarge",
    "ModelNotFound",
    "NoFreeSlot",
    "NoStore",
    "NotFound",
    "OutputUnsupported",
    "PositionConflict",
    "PositionError",
    "PositionGap",
    "QueueFull",
    "QuotaExceeded",
    "ResourceExhausted",
    "RunCancelled",
    "RunTimedOut",
    "SessionBusy",
    "SessionClosed",
    "SessionEvicted",
    "SessionExists",
    "SessionExpired",
    "SessionLimit",
    "SessionLost",
    "SessionMoved",
    "SessionNotFound",
    "StaleHandle",
    "StateDamaged",
    "StateMismatch",
    "StepManyFailed",
    "StoreUnavailable",
    "TimedOut",
    "TokensLost",
    "Unavailable",
    "Unimplemented",
]


class CellserveError(Exception):
    """Everything that this library raises beside TypeError and ValueError for wrong arguments.

    reason: the server's ErrorReason without its prefix, "SESSION_EXPIRED" say; None where it gave none.
    code: the name of the gRPC status code. position: where the session stands, in tokens, where the server
    said so. field: path of the offending field of the request. session_id: the session concerned.
    """

    reason: str | None = None
    code: str = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        position: int | None = None,
        retry_after_seconds: float | None = None,
        session_id: str | None = None,
        field: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.position = position
        self.retry_after_seconds = retry_after_seconds
        self.session_id = session_id
        self.field = field
        if code is not None:
            self.code = code


class InvalidInput(CellserveError, ValueError):
    """A token out of range, a wrong shape, a value that is not finite, an empty run."""

    reason = "INVALID_INPUT"
    code = "INVALID_ARGUMENT"


class OutputUnsupported(InvalidInput):
    """The model does not have this output, or it is too large for one answer."""

    reason = "OUTPUT_UNSUPPORTED"


class NotFound(CellserveError):
    """What was named does not exist."""

    code = "NOT_FOUND"


class SessionNotFound(NotFound):
    """No session has this id, nor had it lately."""

    reason = "SESSION_NOT_FOUND"


class ModelNotFound(NotFound):
    """No model of this name is served."""

    reason = "MODEL_NOT_FOUND"


class CheckpointNotFound(NotFound):
    """The session has no checkpoint of this name."""

    reason = "CHECKPOINT_NOT_FOUND"


class SessionLost(CellserveError):
    """This session object can no longer be used; what it held is gone or somebody else's."""

    code = "NOT_FOUND"


class SessionExpired(SessionLost):
    """The session was idle for longer than the server allows."""

    reason = "SESSION_EXPIRED"


class SessionEvicted(SessionLost):
    """The server or an operator ended the session to make room."""

    reason = "SESSION_EVICTED"


class SessionClosed(SessionLost):
    """A client closed the session."""

    reason = "SESSION_CLOSED"


class SessionMoved(SessionLost):
    """Another client has taken the session over, or another session object of this one: final, never fought over."""

    reason = "SESSION_MOVED"
    code = "ABORTED"


class StaleHandle(SessionLost):
    """The session's epoch changed by somebody else's doing; open it again to go on with it."""

    reason = "STALE_HANDLE"


class TokensLost(SessionLost):
    """The session cannot be made whole.

    The server came back with it at `position`, and this client does not have all the tokens from there on: the
    session's durability is "none", or they were another client's. Open the session again to go on from `position`.
    """

    code = "DATA_LOSS"


class SessionExists(CellserveError):
    """The id is taken, or belongs to a session of another model."""

    reason = "SESSION_EXISTS"
    code = "ALREADY_EXISTS"


class SessionBusy(CellserveError):
    """A generate is under way on the session."""

    reason = "SESSION_BUSY"
    code = "FAILED_PRECONDITION"


class PositionError(CellserveError):
    """The run does not fit where the session stands; `position` tells where that is."""

    code = "FAILED_PRECONDITION"


class PositionGap(PositionError):
    """The run begins ahead of what the session has consumed and accepted."""

    reason = "POSITION_GAP"


class PositionConflict(PositionError):
    """Other tokens have run at this position."""

    reason = "POSITION_CONFLICT"


class AnswerNotHeld(PositionError):
    """The run has run, and its answer is no longer held."""

    reason = "ANSWER_NOT_HELD"
    code = "ABORTED"


class StateMismatch(CellserveError):
    """The state belongs to another model, has another shape, or its checksum is wrong."""

    reason = "STATE_MISMATCH"
    code = "FAILED_PRECONDITION"


class StateDamaged(CellserveError):
    """The stored row of the session is damaged; it is never served."""

    reason = "STATE_DAMAGED"
    code = "DATA_LOSS"


class NoStore(CellserveError):
    """Durability was asked of a server that has no state store."""

    reason = "NO_STORE"
    code = "FAILED_PRECONDITION"


class ResourceExhausted(CellserveError):
    """The server is full; `retry_after_seconds` says when a repeat can succeed, where it told."""

    code = "RESOURCE_EXHAUSTED"


class SessionLimit(ResourceExhausted):
    """As many sessions are open as the server allows."""

    reason = "SESSION_LIMIT"


class NoFreeSlot(ResourceExhausted):
    """The device has no room for another resident state."""

    reason = "NO_FREE_SLOT"


class QueueFull(ResourceExhausted):
    """The session or the server has too many tokens waiting."""

    reason = "QUEUE_FULL"


class QuotaExceeded(ResourceExhausted):
    """The caller's quota is used up."""

    reason = "QUOTA_EXCEEDED"


class MessageTooLarge(ResourceExhausted):
    """A message was larger than one side of the connection accepts."""


class Unavailable(CellserveError):
    """The server, or something that it needs, did not answer within the call's timeout, however often it was asked."""

    code = "UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The server's state store does not answer, or did not make tokens safe before there were `max_kept_tokens`."""

    reason = "STORE_UNAVAILABLE"


class Draining(Unavailable):
    """The server takes no new sessions and will stop soon."""

    reason = "DRAINING"


class ConnectionLost(Unavailable):
    """The connection ended, and until the timeout passed there was no other one.

    in_doubt: whether the request was sent, and so may have taken effect. To repeat the same step is safe: it
    carries its position, so the server gives the answer that it holds and does not run the tokens twice.
    """

    def __init__(
        self, message: str, *, in_doubt: bool = False, code: str | None = None, session_id: str | None = None
    ) -> None:
        super().__init__(message, code=code, session_id=session_id)
        self.in_doubt = in_doubt


class TimedOut(CellserveError, TimeoutError):
    """The answer did not come within the call's timeout. A step that had begun still finishes on the server."""

    code = "DEADLINE_EXCEEDED"


class RunTimedOut(TimedOut):
    """The run's first token had not run when its timeout passed, and it was withdrawn."""

    reason = "RUN_TIMED_OUT"


class RunCancelled(CellserveError):
    """The run was withdrawn before its first token ran."""

    reason = "RUN_CANCELLED"
    code = "CANCELLED"


class EngineFailed(CellserveError):
    """The server's device or engine failed, and it is ending."""

    reason = "ENGINE_FAILED"
    code = "INTERNAL"


class AccessDenied(CellserveError):
    """Credentials are missing, wrong, or not enough."""

    code = "PERMISSION_DENIED"


class Unimplemented(CellserveError):
    """The server does not know this call."""

    code = "UNIMPLEMENTED"


class StepManyFailed(CellserveError):
    """Some sessions of a step_many failed; the others have stepped, and nothing needs to be repeated for
    them.

    failures: what went wrong, by index into the sessions passed in. result: the answers of the others, under
    their own indices; a session that failed has no rows in it.
    """

    def __init__(self, failures: Mapping[int, CellserveError], result: StepManyResult) -> None:
        index, first = next(iter(failures.items()))
        super().__init__(
            f"{len(failures)} of {len(result)} sessions failed; the first at index {index}: {first}",
            code=first.code,
        )
        self.failures = dict(failures)
        self.result = result

    def __reduce__(self) -> tuple[type[StepManyFailed], tuple[object, ...]]:
        return type(self), (self.failures, self.result)


class ClosedError(CellserveError, RuntimeError):
    """This client or session object was closed or detached by its own user."""

    code = "FAILED_PRECONDITION"
