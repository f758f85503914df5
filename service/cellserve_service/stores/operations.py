"""What the service asks of a state store: batches of operations on rows, one row for each session.

A row is opaque bytes beside the few columns that a store compares. It belongs to one replica, the server process that
claimed it last; only that replica may write it. A claim raises the session's epoch and takes the row over, so a replica
that was taken for dead, and lives on, is fenced at its next write.

All times are seconds of the wall clock since 1970, for they outlive a process. A row whose time is over counts as
ended, and is remembered as such for the store's `ended_memory_seconds`; then it is as if the session had never been.

A batch whose answer was lost may have been applied, and is applied again. So every operation gives the same outcome a
second time, if nobody else came between: an attach is KEPT, a creation is known by its `token`, an End by what it says.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


def new_token() -> int:
    """A mark of one claim: 63 bits, for SQLite's integers have a sign."""
    return random.getrandbits(63)


class StoreError(Exception):
    """The store did not take a batch; nothing of it has happened, or it may be repeated. The text is for people."""


@dataclass(frozen=True, slots=True)
class Row:
    """A session as it is stored. `position` and `epoch` are those of the state in `blob`."""

    session_id: str
    model: str
    epoch: int
    position: int
    holder: int  # the mark of the client that holds the session; 0: none
    expires_at: float  # when the session will have been idle for too long
    request_id: str  # of the call that made or last changed the session by an operation; empty: none
    blob: bytes
    checkpoints: bytes | None = None  # marked states; None leaves those that are stored, empty is read back as None


class ClaimMode(Enum):
    """What a claim may find."""

    ATTACH = "attach"  # the session must exist
    CREATE = "create"  # it must not
    ATTACH_OR_CREATE = "attach_or_create"
    RESUME = "resume"  # it must exist, and its holder must be the claim's


@dataclass(frozen=True, slots=True)
class Claim:
    """Take a session over: raise its epoch above the stored one, to `epoch` at least, and make the row this replica's.

    `created` is the row of a new session; None where none may be made. It also replaces one that has ended, and its
    epoch is then above that one's while it is remembered. `holder` None leaves the stored one.
    """

    session_id: str
    model: str | None  # the session must be of this model; None: of any
    mode: ClaimMode
    holder: int | None = None
    epoch: int = 0  # a raised epoch that this replica has given the session already, else 0
    is_resident: bool = False  # this replica holds the session's state: it wants the row only if it lost it
    created: Row | None = None
    token: int = field(default_factory=new_token, compare=False, repr=False)  # tells a repeat from another creation


@dataclass(frozen=True, slots=True)
class ClaimAll:
    """Claims of which all succeed or none: where one is refused, nothing of the others has happened.

    No session stands in it twice.
    """

    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class Save:
    """Write a session's row, if this replica still owns it and it is not older than the stored one.

    A row that is not there is made. One that is there keeps its model, and its session's epoch never sinks.
    """

    row: Row


@dataclass(frozen=True, slots=True)
class End:
    """Replace a session's row, if this replica still owns it or there is none, by the memory of why it ended."""

    session_id: str
    reason: int  # cellserve.v1.ErrorReason
    request_id: str  # of the close; empty: none
    position: int  # where the session stood
    forget_at: float


@dataclass(frozen=True, slots=True)
class Load:
    """Read a session's row, whoever owns it."""

    session_id: str


@dataclass(frozen=True, slots=True)
class ListRows:
    """Stored sessions with an id above `after`, ordered by id; of one model, or of all where `model` is empty."""

    model: str
    after: str
    limit: int


Operation = Claim | ClaimAll | Save | End | Load | ListRows


class ClaimResult(Enum):
    """How a claim ended. All but the first three have changed nothing."""

    CREATED = "created"
    TAKEN = "taken"  # the row was another replica's
    KEPT = "kept"  # the row was this replica's already
    MISSING = "missing"
    ENDED = "ended"
    EXISTS = "exists"  # CREATE of a session that exists, or one of another model
    MOVED = "moved"  # RESUME by another than the holder
    UNDONE = "undone"  # a claim of ClaimAll that would have succeeded


@dataclass(frozen=True, slots=True)
class Ended:
    """A session that is no more, while it is remembered. SESSION_EXPIRED, too, for a row whose time is over."""

    reason: int
    request_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """The outcome of a Claim; ClaimAll gives a list of them, in order.

    `row` for TAKEN, for KEPT unless the claim said is_resident, and for EXISTS: as it is stored now, its holder that of
    the claim. Its `epoch` is that of its state; the session's is `epoch`, for MOVED too, and 0 where there is none.
    """

    result: ClaimResult
    epoch: int = 0
    row: Row | None = None
    ended: Ended | None = None


class Written(Enum):
    """The outcome of a Save or an End."""

    WRITTEN = "written"
    OLDER = "older"  # the stored row of this replica is newer; it stays
    FENCED = "fenced"  # another replica owns the row, or it has ended


@dataclass(frozen=True, slots=True)
class Loaded:
    """The outcome of a Load: a row, or why there is none; neither where the session never was, or is forgotten.

    `epoch` is the session's, that of `row` the one of its state.
    """

    row: Row | None = None
    epoch: int = 0
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """The outcome of a ListRows: rows with their sessions' epochs, and how many sessions there are over all pages."""

    rows: Sequence[tuple[Row, int]]
    total: int


Outcome = Claimed | list[Claimed] | Written | Loaded | Listed


class StateStore(Protocol):
    """Keeps rows. One caller at a time: a batch is applied whole before the next one begins.

    `warnings` has, once the store is open, a line for each setting that makes it less durable than it could be.
    """

    warnings: list[str]

    async def open(self) -> None:
        """Connect, and check that the store can be used. Raises StoreError."""

    async def apply(self, operations: Sequence[Operation], *, now: float) -> list[Outcome]:
        """Do the operations in order and make their changes durable together; returns an outcome for each.

        Raises StoreError: then none of the changes counts, and the batch can be applied again.
        """

    async def watch(self, moved: Callable[[str, int], None]) -> None:
        """Tell of sessions that other replicas take from this one, by id and new epoch, until it is cancelled.

        It only brings forward what the next write would find out; some may be missed.
        """

    async def close(self) -> None:
        """Let go of the store; nothing is under way."""
