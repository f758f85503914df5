"""Keeps durable sessions in the state store: what is written and when, and which answers wait until it is.

It only says what is to be done, in `requests`; keeper.py does it and brings the outcome back. Tick and store never wait
for each other.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core
from cellserve_service.core import Operation as ChainOperation
from cellserve_service.errors import Refusal
from cellserve_service.messages import Done, DurablePositions
from cellserve_service.runs import Kind, Status
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_RUN, NO_SLOT, NO_STREAM, Durability, Stage
from cellserve_service.snapshots import Snapshot, take_snapshot
from cellserve_service.stepping import IntArray
from cellserve_service.store_requests import MOVED, AskStore, StoreRequest, WriteSessions
from cellserve_service.stores.operations import Load, Loaded, Operation, Outcome, Written
from cellserve_service.stores.rows import DamagedError, decode_session
from cellserve_service.withholding import Withholding

# Sessions copied in one turn of the engine, so that a large checkpoint never holds up the ticks.
MAX_TURN_SESSIONS = 512

_DAMAGED = ErrorReason.ERROR_REASON_STATE_DAMAGED


class Keeping:
    """The engine's side of the state store."""

    def __init__(self, core: Core) -> None:
        self.requests: list[StoreRequest] = []
        self.trouble = ""  # why the store does not answer; empty while it does
        self.num_fenced = 0
        self.num_writing = 0  # requests that are under way and change something
        self.withholding = Withholding(core)
        # Ids whose end is on its way to the store. What was claimed before has ended with it.
        self.ending: list[str] = []
        self._core = core
        # By id: claims of the session that are under way. It is not left to the store meanwhile.
        self._claims: Counter[str] = Counter()
        self._changed_at: dict[int, float] = {}  # by number of the write under way: the oldest change in it
        self._num_writes = 0
        self._due = np.empty(0, np.int64)  # rows that the checkpoint under way has still to look at

    # What is to be written.

    def advanced(self, served: ServedModel, rows: IntArray, at_boundary: IntArray) -> None:
        """Sessions were in a tick; some of them stand at a run boundary now. Both are rows of one model."""
        sessions = self._core.sessions
        durable = rows[self._is_kept(rows)]
        if not len(durable):
            return
        at_boundary = at_boundary[self._is_kept(at_boundary)]
        fresh = durable[~sessions.is_dirty[durable]]
        if len(fresh):
            sessions.is_dirty[fresh] = True
            sessions.dirty_since[fresh] = self._core.now
        due = at_boundary[(sessions.durability[at_boundary] == Durability.SYNC) | sessions.is_due[at_boundary]]
        if not len(due):
            return
        is_free = sessions.num_writes[due] == 0
        if np.count_nonzero(is_free) < len(due):
            sessions.is_due[due[~is_free]] = True  # when what is on its way has arrived: a store may be slow, or gone
            due = due[is_free]
        if len(due):
            self.write(served, due)

    def changed(self, row: int) -> None:
        """A session is not as it is stored; the next checkpoint writes it."""
        sessions = self._core.sessions
        if self._is_kept(row) and not sessions.is_dirty[row]:
            sessions.is_dirty[row] = True
            sessions.dirty_since[row] = self._core.now

    def _is_kept(self, rows: IntArray | int) -> NDArray[np.bool_]:
        """Which sessions are to be written."""
        sessions = self._core.sessions
        kept: NDArray[np.bool_] = self._core.sessions.is_durable(rows) & ~sessions.is_leaving[rows]
        return kept

    def is_stored(self, rows: IntArray | int) -> NDArray[np.bool_]:
        """Which sessions the store has as they are."""
        sessions = self._core.sessions
        stored: NDArray[np.bool_] = self._is_kept(rows) & ~sessions.is_dirty[rows] & (sessions.num_writes[rows] == 0)
        return stored

    def begin_checkpoint(self) -> None:
        """Every session that has changed is due to be written: those first whose turn did not come the last time."""
        sessions = self._core.sessions
        sessions.is_due |= sessions.is_dirty
        due = np.flatnonzero(sessions.is_due)
        first = np.searchsorted(due, self._due[0]) if len(self._due) else 0
        self._due = np.roll(due, -first)

    def write_due(self) -> bool:
        """Write sessions that are due and stand at a run boundary, as many as a turn takes; whether there are more."""
        sessions = self._core.sessions
        due, self._due = self._due[:MAX_TURN_SESSIONS], self._due[MAX_TURN_SESSIONS:]
        for served in self._core.served:
            rows = self._writable(served, due[sessions.model[due] == served.index])
            if len(rows):
                self.write(served, rows)
        return len(self._due) > 0

    def _writable(self, served: ServedModel, rows: IntArray) -> IntArray:
        """Sessions that are due, stand at a run boundary, and are not being written; begins to load missing states."""
        sessions, table = self._core.sessions, served.runs
        rows = rows[
            sessions.is_due[rows]
            & sessions.is_dirty[rows]
            & (sessions.num_writes[rows] == 0)
            & (sessions.stage[rows] != Stage.LOADING)
        ]
        first = sessions.next_run[rows]
        inside = (first != NO_RUN) & (table.status[first] == Status.STARTED) & (table.kind[first] == Kind.RUN)
        return self.fetch_states(served, rows[~inside])

    def write(
        self,
        served: ServedModel,
        rows: IntArray,
        *,
        with_marks: bool = False,
        then: Callable[[bool], None] | None = None,
    ) -> None:
        """Write sessions of one model that stand at a run boundary. then: gets whether it is stored, of one session."""
        core, sessions = self._core, self._core.sessions
        snapshot = take_snapshot(core, served, rows, with_marks=with_marks)
        changed_at = np.where(sessions.is_dirty[rows], sessions.dirty_since[rows], core.now)
        sessions.is_dirty[rows] = sessions.is_due[rows] = False
        sessions.num_writes[rows] += 1
        self._num_writes += 1
        number = self._num_writes
        self._changed_at[number] = float(changed_at.min())
        self.num_writing += 1

        def done(outcomes: Sequence[Written]) -> None:
            self.num_writing -= 1
            del self._changed_at[number]
            current = rows[sessions.incarnation[rows] == snapshot.incarnations]
            sessions.num_writes[current] -= 1
            is_stored, *advanced = self._written(snapshot, outcomes)
            if then is not None:
                then(bool(is_stored[0]))
            self._tell(*advanced)  # after that, which may have told a handle
            again = self._writable(served, current)
            if len(again):
                self.write(served, again)

        self.requests.append(WriteSessions(snapshot, done))

    def write_through(self, row: int, event: Done, *, with_marks: bool = False) -> None:
        """Give an answer once the session is stored as it is now; at once where it is not durable."""
        core, served = self._core, self._core.model_of(row)
        if not core.sessions.is_durable(row):
            core.events.append(event)
            return
        if core.sessions.is_leaving[row]:
            self.withholding.withhold(event, [row], [np.inf])
            return

        def then(is_stored: bool) -> None:
            if is_stored:
                core.events.append(event)
            else:
                core.refuse(event.stream, event.requests, [MOVED] * len(event.requests))

        self.write(served, np.array([row], np.int64), with_marks=with_marks, then=then)

    def refuse_if_ours(self, row: int, stream: int, request: int, refusal: Refusal) -> None:
        """Refuse what a durable session lacks once the store has confirmed that it is this server's."""

        def then(is_stored: bool) -> None:
            self._core.refuse(stream, [request], [refusal if is_stored else MOVED])

        if self._is_kept(row):
            self.write(self._core.model_of(row), np.array([row], np.int64), then=then)
        else:
            then(True)

    def ask(
        self,
        operations: Sequence[Operation],
        done: Callable[[Sequence[Outcome]], None],
        failed: Callable[[Refusal], None] | None = None,
    ) -> None:
        """Ask the store something. failed: None where it must be done, however long it takes."""
        trouble = self.unavailable()
        if failed is not None and trouble is not None:
            failed(trouble)
        elif failed is None:
            self.num_writing += 1

            def counted(outcomes: Sequence[Outcome]) -> None:
                self.num_writing -= 1
                done(outcomes)

            self.requests.append(AskStore(operations, counted))
        else:
            self.requests.append(AskStore(operations, done, failed))

    def begin_claims(self, session_ids: Iterable[str]) -> None:
        """The store is asked for sessions."""
        self._claims.update(session_ids)

    @property
    def claimed(self) -> Collection[str]:
        """Sessions that the store is being asked for."""
        return self._claims

    def end_claims(self, session_ids: Iterable[str]) -> None:
        """What came of it has been taken."""
        for session_id in session_ids:
            self._claims[session_id] -= 1
            if not self._claims[session_id]:
                del self._claims[session_id]

    def unavailable(self) -> Refusal | None:
        """Why nothing can be written through now, if the store does not answer."""
        if not self.trouble:
            return None
        return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, f"the state store does not answer: {self.trouble}")

    def lag_seconds(self, now: float) -> float:
        """How long the oldest change has waited to be durable."""
        sessions = self._core.sessions
        oldest = [now, *list(self._changed_at.values())]  # the metrics' thread reads while the engine's writes
        dirty = sessions.dirty_since[sessions.is_dirty]
        if len(dirty):
            oldest.append(float(dirty.min()))
        return now - min(oldest)

    def _written(self, snapshot: Snapshot, outcomes: Sequence[Written]) -> tuple[NDArray[np.bool_], IntArray, IntArray]:
        """Sessions have been written, or not. Returns which of them are stored as they were, or newer; then those that
        are durable further than before, and how far.
        """
        sessions = self._core.sessions
        current = sessions.incarnation[snapshot.rows] == snapshot.incarnations
        fenced = np.array([outcome is Written.FENCED for outcome in outcomes], np.bool_)
        older = np.array([outcome is Written.OLDER for outcome in outcomes], np.bool_)
        # Older, with nothing newer on its way, is stale: another server had the session and wrote it, before a claim
        # made it this one's again. Otherwise it was a batch done twice.
        stale = fenced | (older & (sessions.num_writes[snapshot.rows] == 0))
        kept = current & ~fenced & ~older
        rows, lines, positions = snapshot.rows[kept], snapshot.lines[kept], snapshot.positions[kept]
        if self.withholding.rows:
            for row, line, position in zip(rows.tolist(), lines.tolist(), positions.tolist(), strict=True):
                self.withholding.release(row, line, position)
        advances = (lines == sessions.line[rows]) & (positions != sessions.durable_position[rows])
        rows, positions = rows[advances], positions[advances]
        sessions.durable_position[rows] = positions
        for row in snapshot.rows[current & stale].tolist():
            if sessions.ids[row] is not None:
                self.lose(row, MOVED)
        self.num_fenced += int(fenced.sum())
        return ~stale, rows, positions

    def _tell(self, rows: IntArray, positions: IntArray) -> None:
        """Tell the streams that hold sessions how far these are durable."""
        sessions = self._core.sessions
        if self._core.operations:
            # Who holds it now counts from what is to come.
            told = np.array([not self._core.awaits_replacement(row) for row in rows.tolist()], np.bool_)
            rows, positions = rows[told], positions[told]
        owners = sessions.owner[rows]
        for owner in np.unique(owners[owners != NO_STREAM]).tolist():
            mine = owners == owner
            event = DurablePositions(owner, sessions.handle[rows[mine]].copy(), positions[mine])
            self._core.events.append(event)

    # Sessions that leave, and states that come back.

    def lose(self, row: int, refusal: Refusal) -> None:
        """The session is another server's, or cannot be read: its holder and its callers are told, and it leaves."""
        core, sessions = self._core, self._core.sessions
        sessions.is_in_store[row] = False  # nothing is fetched for it any more
        if row in core.generations:
            core.generations[row].is_lost = True
        core.break_off_generation(row, refusal)
        self._refuse_begun(row, refusal)
        core.refuse_operations(row, refusal)
        core.withdraw(row, dict.fromkeys(core.waiting_runs(row), refusal))
        core.tell_owner(row, refusal.reason)
        if int(sessions.owner[row]) != NO_STREAM and refusal.reason == MOVED.reason:
            sessions.remember_moved(row)
        sessions.owner[row] = NO_STREAM
        self.withholding.lose(row)
        sessions.durability[row] = Durability.NONE
        sessions.is_dirty[row] = sessions.is_due[row] = False
        core.wake(row)
        if sessions.ids[row] is None:  # it is being closed, and leaves by that
            core.go_on_with(row)
        else:
            sessions.forget_id(row)
            self.leave(row)

    def _refuse_begun(self, row: int, refusal: Refusal) -> None:
        """A run that is under way goes on for nobody: where it leads is not where the session is."""
        core, served = self._core, self._core.model_of(row)
        runs, run = served.runs, int(core.sessions.next_run[row])
        if run == NO_RUN or runs.kind[run] != Kind.RUN or runs.status[run] != Status.STARTED:
            return
        stream, request = runs.request_of(run)
        core.refuse(stream, [request], [refusal])
        for joined in core.joined.pop((served.index, run), ()):
            core.refuse(joined.stream, [joined.request], [refusal])
        runs.requests.stream[runs.asked[run]] = NO_STREAM

    def leave(self, row: int) -> None:
        """Free a session without an id when what was accepted is done."""
        core = self._core

        def execute() -> None:
            served = core.model_of(row)
            served.runs.forget(row)
            served.slots.release(row)
            core.sessions.free(row)

        core.when_idle(row, ChainOperation(execute))

    def hand_over(self, row: int, event: Done) -> None:
        """Leave a session to the store, from where any server can take it; then answer."""
        core = self._core

        def then(is_stored: bool) -> None:
            if is_stored:
                self.unload(row)
                core.events.append(event)
            else:
                core.refuse(event.stream, event.requests, [MOVED] * len(event.requests))

        if core.sessions.is_leaving[row]:
            self.withholding.withhold(event, [row], [np.inf])
        elif self.is_stored(row):
            then(True)
        else:
            self.write(core.model_of(row), np.array([row], np.int64), then=then)

    def unload(self, row: int) -> None:
        """Leave a session to the store, if it is stored as it is and nobody uses it."""
        sessions = self._core.sessions
        session_id = sessions.ids[row]
        if (
            session_id is not None
            and session_id not in self._claims
            and sessions.owner[row] == NO_STREAM
            and sessions.next_run[row] == NO_RUN
            and sessions.stage[row] == Stage.IDLE
            and self.is_stored(row)
        ):
            sessions.forget_id(row)
            sessions.is_in_store[row] = False  # the state of a session that leaves need not be fetched
            self.leave(row)

    def fetch_states(self, served: ServedModel, rows: IntArray) -> IntArray:
        """Begin to load the states that are in the store alone; returns the sessions that need not wait for it."""
        sessions = self._core.sessions
        stored: NDArray[np.bool_] = sessions.is_in_store[rows]
        if not stored.any():
            return rows
        for row in rows[stored].tolist():
            sessions.stage[row] = Stage.LOADING
            self._fetch(served, row)
        return rows[~stored]

    def _fetch(self, served: ServedModel, row: int) -> None:
        core, sessions = self._core, self._core.sessions
        session_id, incarnation = sessions.ids[row], int(sessions.incarnation[row])
        assert session_id is not None

        def done(outcomes: Sequence[Outcome]) -> None:
            if sessions.incarnation[row] != incarnation or sessions.stage[row] != Stage.LOADING:
                return
            loaded = outcomes[0]
            assert isinstance(loaded, Loaded)
            sessions.stage[row] = Stage.IDLE
            stored = loaded.row
            if stored is None or stored.epoch > sessions.line[row] or stored.position != sessions.position[row]:
                self.lose(row, MOVED)
                return
            try:
                state = decode_session(session_id, stored.request_id, stored.blob).state()
            except DamagedError as error:
                self.lose(row, Refusal(_DAMAGED, f"the stored row of session {session_id!r} is damaged: {error}"))
                return
            sessions.is_in_store[row] = False
            sessions.parked[row] = state
            served.slots.num_fetched += 1
            core.go_on_with(row)

        self.ask([Load(session_id)], done)

    def shed(self, max_parked: int) -> None:
        """Leave the states of the longest idle sessions to the store, where the host holds too many."""
        sessions = self._core.sessions
        excess = len(sessions.parked) - max_parked
        if excess <= 0:
            return
        rows = np.fromiter(sessions.parked, np.int64, len(sessions.parked))
        rows = rows[self.is_stored(rows) & (sessions.next_run[rows] == NO_RUN) & (sessions.slot[rows] == NO_SLOT)]
        oldest = rows[sessions.last_used[rows].argsort(kind="stable")][:excess]
        for row in oldest.tolist():
            del sessions.parked[row]
        sessions.is_in_store[oldest] = True
