"""The session table: every open session as one row of arrays, and the memory of ended ones. Pure: it knows no clock."""

import secrets
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.idle_queue import IdleQueue
from cellserve_service.stepping import FloatArray, IntArray
from cellserve_service.stores.rows import LastRequest
from cellserve_service.tables import Int32Array, Table, zeros

_ROW_SHIFT = np.uint64(32)

NO_STREAM = 0
NO_RUN = -1
NO_ROW = -1
NO_SLOT = 0

ENDED_MESSAGE = {
    ErrorReason.ERROR_REASON_SESSION_EXPIRED: "was idle for too long and has ended",
    ErrorReason.ERROR_REASON_SESSION_EVICTED: "was ended by the server",
    ErrorReason.ERROR_REASON_SESSION_CLOSED: "was closed",
}


class Stage:
    """What becomes of a session's first unfinished run."""

    IDLE: Final = 0  # there is none
    READY: Final = 1  # the session stands in the queue of its model
    RESTING: Final = 2  # its stream reads too slowly
    IN_TICK: Final = 3
    LOADING: Final = 4  # its state comes from the store


class Durability:
    """What a crash may cost a session: the contract's numbers, plain for numpy."""

    NONE: Final = 1
    PERIODIC: Final = 2
    SYNC: Final = 3


class _Ended(NamedTuple):
    """A session that has left, and why."""

    session_id: str
    reason: ErrorReason.ValueType
    at: float


class SessionTable(Table):
    """Sessions as arrays over rows 0 to capacity - 1, with one dict from id to row.

    A handle is `row << 32 | generation`. A generation changes with the epoch and when the session ends, and starts at
    a random number, so that a handle of an earlier server names nothing here.
    """

    # What a step needs.
    COLUMNS: ClassVar[tuple[tuple[str, type], ...]] = (
        ("handle", np.uint64),
        ("position", np.int64),  # tokens consumed
        ("accepted", np.int64),  # where the session stands after all that was accepted
        ("last_used", np.float64),
        # A session's runs form one chain in its model's run table: held answers, then unfinished runs.
        ("next_run", np.int64),  # the first unfinished one
        ("first_run", np.int32),
        ("last_held", np.int32),
        ("last_run", np.int32),
        ("num_held", np.int32),
        ("held_words", np.int32),
        ("num_unfinished", np.int32),
        ("num_pending_tokens", np.int32),
        ("slot", np.int32),
    )

    handle: NDArray[np.uint64]
    position: IntArray
    accepted: IntArray
    last_used: NDArray[np.float64]
    next_run: IntArray
    first_run: Int32Array
    last_held: Int32Array
    last_run: Int32Array
    num_held: Int32Array
    held_words: Int32Array
    num_unfinished: Int32Array
    num_pending_tokens: Int32Array
    slot: Int32Array

    def __init__(self, capacity: int, *, max_ended: int = 1 << 20) -> None:
        super().__init__(capacity)
        self.handle[:] = np.arange(capacity, dtype=np.uint64) << _ROW_SHIFT | np.uint64(secrets.randbits(32))
        self._last_row = np.uint64(capacity - 1)
        for runs in (self.next_run, self.first_run, self.last_held, self.last_run):
            runs[:] = NO_RUN
        # What is looked through as a whole, or has no part in a step.
        self.is_open = zeros(capacity, np.bool_)
        self.stage = zeros(capacity, np.uint8)
        self.model = zeros(capacity, np.int16)
        self.owner = zeros(capacity, np.int64)  # the stream that holds the session
        self.is_generating = zeros(capacity, np.bool_)
        self.epoch = zeros(capacity, np.int64)
        self.created_at = zeros(capacity, np.float64)
        # Tells a session from the ones that had its row before, for what comes back from the store.
        self.incarnation = zeros(capacity, np.uint32)
        # For the store: the epoch in which the state was made, replaced or taken from it. Positions of different lines
        # have nothing to do with each other; the store keeps what is newest by line and position.
        self.line = zeros(capacity, np.int64)
        self.holder = zeros(capacity, np.uint64)  # the client's mark; 0: none
        self.durability = np.full(capacity, Durability.NONE, np.uint8)
        self.durable_position = zeros(capacity, np.int64)  # of a session that is not NONE
        self.is_dirty = zeros(capacity, np.bool_)  # what the store has is behind
        self.dirty_since = zeros(capacity, np.float64)
        self.is_due = zeros(capacity, np.bool_)  # to be written at its next run boundary
        self.num_writes = zeros(capacity, np.int32)  # on their way to the store
        self.is_in_store = zeros(capacity, np.bool_)  # its state is in the store alone
        # It is closed, and finishes what it had accepted; it is not written any more.
        self.is_leaving = zeros(capacity, np.bool_)
        self._zero_when_free = (
            self.line,
            self.holder,
            self.durable_position,
            self.is_dirty,
            self.is_due,
            self.num_writes,
            self.is_in_store,
            self.is_leaving,
        )
        self.last_request: dict[int, LastRequest] = {}
        self.marks: dict[
            int, dict[str, tuple[int, FloatArray]]
        ] = {}  # by name, oldest first: position, (L, state_size)
        self.ids: list[str | None] = [None] * capacity
        self.row_by_id: dict[str, int] = {}
        self.parked: dict[int, FloatArray] = {}  # states in host memory, (L, state_size)
        self._idle_queue = IdleQueue(capacity)
        # No OrderedDict: that of a million takes a quarter of a second to grow.
        self._ended: dict[str, _Ended] = {}
        self._ended_in_order: deque[_Ended] = deque()
        self._max_ended = max_ended
        # Handles that a stream lost to another one, so that its next frame is told so.
        self._moved: dict[int, set[int]] = {}

    @overload
    def is_durable(self, rows: int) -> bool: ...
    @overload
    def is_durable(self, rows: IntArray) -> NDArray[np.bool_]: ...
    def is_durable(self, rows: IntArray | int) -> NDArray[np.bool_] | bool:
        """Whether the store is to have a session, or which of several."""
        durable: NDArray[np.bool_] = self.durability[rows] != Durability.NONE
        return durable if isinstance(rows, np.ndarray) else bool(durable)

    def create(self, session_ids: Sequence[str], model: int, stream: int, now: float) -> IntArray:
        """Give ids a row each. The caller has checked that there is room and that the ids are new."""
        number = len(session_ids)
        assert number <= self._num_free
        rows = self._take(number)[::-1].copy()
        for session_id, row in zip(session_ids, rows.tolist(), strict=True):
            assert session_id not in self.row_by_id
            self.ids[row] = session_id
            self.row_by_id[session_id] = row
            self._ended.pop(session_id, None)
        self.is_open[rows] = True
        self.epoch[rows] = 1
        self.model[rows] = model
        self.owner[rows] = stream
        self.position[rows] = self.accepted[rows] = 0
        self.last_used[rows] = self.created_at[rows] = now
        self._idle_queue.put(rows, now)
        return rows

    def keep(self, row: int, durability: int) -> None:
        """The store has a new session, as it stands."""
        self.durability[row] = durability
        self.durable_position[row] = self.position[row]
        self.line[row] = 1

    def forget_id(self, row: int) -> str:
        """A session leaves: its id and handle name nothing here any more. Returns the id."""
        session_id = self.ids[row]
        assert session_id is not None
        del self.row_by_id[session_id]
        self.ids[row] = None
        self._next_generation(row)
        return session_id

    def remember_ended(self, session_id: str, reason: ErrorReason.ValueType, now: float) -> None:
        """For a while it is known why a session that has left is no more."""
        ended = self._ended[session_id] = _Ended(session_id, reason, now)
        self._ended_in_order.append(ended)
        if len(self._ended_in_order) > self._max_ended:
            self._forget_oldest()

    def free(self, row: int) -> None:
        """Let an ended session's row be given again. The caller has freed its runs and its slot."""
        assert self.ids[row] is None
        assert self.first_run[row] == NO_RUN
        assert self.slot[row] == NO_SLOT
        self.is_open[row] = False
        self.owner[row] = NO_STREAM
        self.parked.pop(row, None)
        self.last_request.pop(row, None)
        self.marks.pop(row, None)
        self.stage[row] = Stage.IDLE
        self.durability[row] = Durability.NONE
        self.incarnation[row] += np.uint32(1)
        for column in self._zero_when_free:
            if column[row]:  # what was never written costs no memory
                column[row] = 0
        self._give_back(np.array([row]))

    def forget_ended(self, before: float, most: int) -> bool:
        """Drop the memory of sessions that ended before a moment, at most so many; whether there are more."""
        for _ in range(most):
            if not self._ended_in_order or self._ended_in_order[0].at >= before:
                return False
            self._forget_oldest()
        return True

    def _forget_oldest(self) -> None:
        oldest = self._ended_in_order.popleft()
        if self._ended.get(oldest.session_id) is oldest:  # and has not been opened again since
            del self._ended[oldest.session_id]

    def begin_epoch(self, row: int, stream: int, epoch: int = 0) -> None:
        """Make earlier handles stale; the session now belongs to `stream`. epoch: what it is at least from now on."""
        self.epoch[row] = max(int(self.epoch[row]) + 1, epoch)
        self.hand_to(row, stream)

    def hand_to(self, row: int, stream: int) -> None:
        """Make earlier handles stale in the same epoch; the session now belongs to `stream`."""
        self._next_generation(row)
        self.owner[row] = stream

    def remember_moved(self, row: int) -> None:
        """The stream that holds the session is about to lose it to another one."""
        moved = self._moved.setdefault(int(self.owner[row]), set())
        if len(moved) < self.capacity:
            moved.add(int(self.handle[row]))

    def release_stream(self, stream: int) -> None:
        """The stream is gone: its sessions belong to nobody."""
        self._moved.pop(stream, None)
        self.owner[self.owner == stream] = NO_STREAM

    def _next_generation(self, row: int) -> None:
        self.handle[row] = row << 32 | (int(self.handle[row]) + 1) & 0xFFFFFFFF

    def resolve_handles(
        self, stream: int | IntArray, handles: NDArray[np.uint64]
    ) -> tuple[IntArray, NDArray[np.bool_]]:
        """Rows of handles, and which of them are valid on the stream, one for all or one each.

        The row of an invalid one means nothing.
        """
        rows = np.minimum(handles >> _ROW_SHIFT, self._last_row).view(np.int64)
        return rows, (self.handle[rows] == handles) & (self.owner[rows] == stream)

    def refuse_handle(self, stream: int, handle: int) -> Refusal:
        """Why a handle is not valid on a stream."""
        if handle in self._moved.get(stream, ()):
            return Refusal(
                ErrorReason.ERROR_REASON_SESSION_MOVED,
                "the session was taken over by another stream; attach it to take it back",
                field="handles",
            )
        return Refusal(
            ErrorReason.ERROR_REASON_STALE_HANDLE,
            f"handle {handle:#x} is not valid on this stream; attach the session by its id",
            field="handles",
        )

    def resolve_id(self, session_id: str) -> int | Refusal:
        """The row of an id, or why there is none."""
        row = self.row_by_id.get(session_id)
        if row is not None:
            return row
        ended = self._ended.get(session_id)
        if ended is not None:
            return Refusal(ended.reason, f"session {session_id!r} {ENDED_MESSAGE[ended.reason]}", field="session_id")
        return Refusal(
            ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, f"no session {session_id!r} here", field="session_id"
        )

    def take_idle(self, before: float, most: int) -> tuple[IntArray, bool]:
        """Open sessions without unfinished runs that were last used before a moment: they must be ended now.

        At most so many are looked at; returns also whether there are more to look at.
        """
        rows = self._idle_queue.take(before, most)
        rows = rows[self.is_open[rows]]
        idle = (self.last_used[rows] < before) & (self.num_unfinished[rows] == 0)
        others = rows[~idle]
        self._idle_queue.put_back(others, self.last_used[others])
        return rows[idle], self._idle_queue.has_due
