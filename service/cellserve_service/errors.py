"""The error table: every reason with its status code, and the exception that carries one to the caller."""

from dataclasses import dataclass

from google.rpc.code_pb2 import Code

from cellserve.v1.errors_pb2 import ErrorReason

DOMAIN = "cellserve"

# DESIGN.md section 5, row by row.
CODE_BY_REASON: dict[ErrorReason.ValueType, int] = {
    ErrorReason.ERROR_REASON_SESSION_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_MODEL_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_SESSION_EXPIRED: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_SESSION_EVICTED: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_SESSION_CLOSED: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_STALE_HANDLE: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_SESSION_EXISTS: Code.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_INVALID_INPUT: Code.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_OUTPUT_UNSUPPORTED: Code.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_POSITION_GAP: Code.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_POSITION_CONFLICT: Code.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_ANSWER_NOT_HELD: Code.ABORTED,
    ErrorReason.ERROR_REASON_STATE_MISMATCH: Code.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_NO_STORE: Code.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_SESSION_MOVED: Code.ABORTED,
    ErrorReason.ERROR_REASON_SESSION_BUSY: Code.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.ERROR_REASON_SESSION_LIMIT: Code.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_NO_FREE_SLOT: Code.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_QUOTA_EXCEEDED: Code.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: Code.UNAVAILABLE,
    ErrorReason.ERROR_REASON_STATE_DAMAGED: Code.DATA_LOSS,
    ErrorReason.ERROR_REASON_DRAINING: Code.UNAVAILABLE,
    ErrorReason.ERROR_REASON_ENGINE_FAILED: Code.INTERNAL,
    ErrorReason.ERROR_REASON_RUN_CANCELLED: Code.CANCELLED,
    ErrorReason.ERROR_REASON_RUN_TIMED_OUT: Code.DEADLINE_EXCEEDED,
}

# When a refusal for want of room is worth another try.
RETRY_AFTER_MILLISECONDS: dict[ErrorReason.ValueType, int] = {
    ErrorReason.ERROR_REASON_SESSION_LIMIT: 1000,
    ErrorReason.ERROR_REASON_NO_FREE_SLOT: 100,
    ErrorReason.ERROR_REASON_QUEUE_FULL: 50,
    ErrorReason.ERROR_REASON_QUOTA_EXCEEDED: 1000,
    ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: 1000,
    ErrorReason.ERROR_REASON_DRAINING: 1000,
}


def reason_name(reason: ErrorReason.ValueType) -> str:
    """The reason as it stands in ErrorInfo and in metric labels: without the enum's prefix."""
    return ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


# Not frozen: an exception gets its traceback by assignment.
@dataclass(slots=True, unsafe_hash=True)
class Refusal(Exception):  # noqa: N818 - it is a value as often as it is raised
    """Why one request is refused: the reason, a sentence for people, and what the caller can act on."""

    reason: ErrorReason.ValueType
    message: str
    position: int = 0
    field: str = ""

    @property
    def code(self) -> int:
        return CODE_BY_REASON[self.reason]

    @property
    def retry_after_milliseconds(self) -> int:
        return RETRY_AFTER_MILLISECONDS.get(self.reason, 0)

    def __str__(self) -> str:
        return self.message


def invalid(message: str, field: str = "") -> Refusal:
    """INVALID_INPUT, naming the offending field."""
    return Refusal(ErrorReason.ERROR_REASON_INVALID_INPUT, message, field=field)


class StartError(Exception):
    """The server cannot start: what is wrong and what to do, in one line."""
