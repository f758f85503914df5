"""What the engine asks of the state store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.snapshots import Snapshot
from cellserve_service.stores.operations import Operation, Outcome, Written

MOVED = Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, "another server has taken the session over")


@dataclass(frozen=True, slots=True)
class WriteSessions:
    """Write sessions as they were. Tried again until it succeeds."""

    snapshot: Snapshot
    done: Callable[[Sequence[Written]], None]


@dataclass(frozen=True, slots=True)
class AskStore:
    """Do operations in order. `failed` gets why the store did not; None: it is tried again until it succeeds."""

    operations: Sequence[Operation]
    done: Callable[[Sequence[Outcome]], None]
    failed: Callable[[Refusal], None] | None = None


StoreRequest = WriteSessions | AskStore
