"""What happens to an open session beside running: reset, import, export, fork, close, expiry, listing."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.adoption import first_answer, read_stored, stored_marks
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.keeping import MOVED
from cellserve_service.messages import (
    CheckpointSession,
    CloseSessions,
    DetachSessions,
    Done,
    ExportSession,
    ForkSession,
    GetSession,
    ImportSession,
    InitialState,
    ListSessions,
    ResetSessions,
    RollbackSession,
    SessionFacts,
    SessionForked,
    SessionsListed,
    SessionTarget,
    StateExported,
    Tier,
)
from cellserve_service.opening import (
    check_session_id,
    check_state,
    created_row,
    made_id,
    no_more_sessions,
    session_limit,
)
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_RUN, NO_SLOT, NO_STREAM, Durability
from cellserve_service.snapshots import new_session
from cellserve_service.stepping import FloatArray
from cellserve_service.stores.operations import (
    Claim,
    Claimed,
    ClaimMode,
    ClaimResult,
    End,
    Listed,
    ListRows,
    Outcome,
    Row,
    Written,
)
from cellserve_service.stores.rows import LastRequest, StoredSession

_BUSY = Refusal(ErrorReason.ERROR_REASON_SESSION_BUSY, "a generate is under way on the session")
_FULL = Refusal(ErrorReason.ERROR_REASON_QUEUE_FULL, "too much waits for the session's runs already")
_STALE = ErrorReason.ERROR_REASON_STALE_HANDLE
_CLOSED = ErrorReason.ERROR_REASON_SESSION_CLOSED
_EXPIRED = ErrorReason.ERROR_REASON_SESSION_EXPIRED


class Lifecycle:
    """Operations on sessions. Those that need the state wait in the session's chain for its accepted runs."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def reset(self, command: ResetSessions) -> None:
        for request, row in self._idle_rows(command.target, changes=True):
            self._replace(command.target, request, row, position=0, state=None)

    def import_state(self, command: ImportSession) -> None:
        for request, row in self._idle_rows(command.target, changes=True):
            mismatch = check_state(self._core.model_of(row).info, command.state)
            if mismatch is not None:
                self._core.refuse(command.target.stream, [request], [mismatch])
            else:
                self._replace(command.target, request, row, command.state.position, command.state.values)

    def checkpoint(self, command: CheckpointSession) -> None:
        """Mark the state under a name, once the runs accepted before are done."""
        core, sessions = self._core, self._core.sessions
        for request, row in self._idle_rows(command.target, changes=True):

            def execute(request: int = request, row: int = row) -> None:
                marks = sessions.marks.setdefault(row, {})
                marks.pop(command.name, None)
                position = int(sessions.position[row])
                marks[command.name] = (position, core.model_of(row).slots.state(row))
                while len(marks) > core.limits.max_checkpoints:
                    del marks[next(iter(marks))]
                epoch = int(sessions.epoch[row])
                self._remember(command.target, row, epoch, position)
                self._stored(row, done_event(command.target.stream, request, 0, epoch, position), with_marks=True)

            core.when_idle(row, Operation(execute, refuse=self._refuser(command.target, request)))

    def rollback(self, command: RollbackSession) -> None:
        """Go back to a marked state. The mark is looked for when it is asked for, not when the runs before are done."""
        for request, row in self._idle_rows(command.target, changes=True):
            mark = self._core.sessions.marks.get(row, {}).get(command.name)
            if mark is None:
                message = f"the session has no checkpoint {command.name!r}"
                refusal = Refusal(ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND, message, field="name")
                self._refuse_missing(command.target, request, row, refusal)
            else:
                self._replace(command.target, request, row, mark[0], mark[1].copy())

    def _refuse_missing(self, target: SessionTarget, request: int, row: int, refusal: Refusal) -> None:
        """Refuse what the session lacks here. Another server may have taken it, and given it that, unnoticed so far."""
        core, keeping = self._core, self._core.keeping
        if keeping is None:
            core.refuse(target.stream, [request], [refusal])
            return
        operation = Operation(
            lambda: keeping.refuse_if_ours(row, target.stream, request, refusal), refuse=self._refuser(target, request)
        )
        core.when_idle(row, operation)

    def _replace(self, target: SessionTarget, request: int, row: int, position: int, state: FloatArray | None) -> None:
        """Give the session another state and a new epoch. Its handles are stale at once, whenever that happens."""
        core, sessions = self._core, self._core.sessions
        owner = int(sessions.owner[row])
        core.begin_epoch(row, owner if owner == target.stream else NO_STREAM, _STALE)
        if owner != target.stream and int(sessions.holder[row]) != target.holder:
            sessions.holder[row] = 0
        handle, epoch = int(sessions.handle[row]), int(sessions.epoch[row])

        def execute() -> None:
            served = core.model_of(row)
            served.runs.forget(row)
            served.slots.replace_state(row, state)
            sessions.position[row] = position
            # Not only the epoch: what ran before may have been written since that began.
            sessions.line[row] = max(epoch, int(sessions.line[row]) + 1)
            sessions.durable_position[row] = 0
            sessions.last_used[row] = core.now
            self._remember(target, row, epoch, position)
            self._stored(row, done_event(target.stream, request, handle, epoch, position))

        core.when_idle(row, Operation(execute, position, self._refuser(target, request)))

    def _remember(self, target: SessionTarget, row: int, epoch: int, position: int) -> None:
        if target.request_id:
            self._core.sessions.last_request[row] = LastRequest(target.request_id, epoch, position)

    def _stored(self, row: int, event: Done, *, with_marks: bool = False) -> None:
        """Give an answer once the session is stored as it is, where it is to be."""
        if self._core.keeping is None:
            self._core.events.append(event)
        else:
            self._core.keeping.write_through(row, event, with_marks=with_marks)

    def _refuser(self, target: SessionTarget, request: int) -> Callable[[Refusal], None]:
        return lambda refusal: self._core.refuse(target.stream, [request], [refusal])

    def detach(self, command: DetachSessions) -> None:
        """Nobody holds the sessions from now on; with a store they are left to it when their runs are done."""
        core, sessions = self._core, self._core.sessions
        for request, row in self._idle_rows(command.target):
            sessions.begin_epoch(row, NO_STREAM)
            core.wake(row)
            epoch = int(sessions.epoch[row])

            def execute(request: int = request, row: int = row, epoch: int = epoch) -> None:
                event = done_event(command.target.stream, request, 0, epoch, int(sessions.position[row]))
                keeping = core.keeping
                if keeping is None or sessions.durability[row] == Durability.NONE:
                    core.events.append(event)
                else:
                    # The next attach, wherever it is, gives a later epoch: this one is stored, too.
                    sessions.line[row] = max(int(sessions.line[row]), epoch)
                    keeping.changed(row)
                    keeping.hand_over(row, event)

            core.when_idle(row, Operation(execute, refuse=self._refuser(command.target, request)))

    def export(self, command: ExportSession) -> None:
        core, stream = self._core, command.target.stream
        for request, row in self._idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                served = core.model_of(row)
                position = int(core.sessions.position[row])
                state = InitialState(served.info.fingerprint, position, served.slots.state(row))
                core.events.append(StateExported(stream, request, state))

            core.when_idle(row, Operation(execute, refuse=self._refuser(command.target, request)))

    def fork(self, command: ForkSession) -> None:
        core, sessions = self._core, self._core.sessions
        for request, row in self._idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                served = core.model_of(row)
                state, position = served.slots.state(row), int(sessions.position[row])
                self._fork(command, request, served, int(sessions.durability[row]), position, state)

            core.when_idle(row, Operation(execute, refuse=self._refuser(command.target, request)))

    def _fork(
        self, command: ForkSession, request: int, served: ServedModel, durability: int, position: int, state: FloatArray
    ) -> None:
        core, stream = self._core, command.target.stream
        request_id, source = command.target.request_id, command.target.session_ids
        fork_id = command.fork_id or made_id(request_id, "" if source is None else source[0])

        def refuse(refusal: Refusal) -> None:
            core.statistics.sessions_rejected[reason_name(refusal.reason)] += 1
            core.refuse(stream, [request], [refusal])

        here = core.sessions.row_by_id.get(fork_id)
        first = None if here is None else core.sessions.last_request.get(here)
        if first is not None and request_id and first.request_id == request_id:
            core.events.append(SessionForked(stream, request, fork_id, first.position, first.epoch))
            return
        refusal = self._check_fork(fork_id)
        if refusal is not None:
            refuse(refusal)
            return
        if durability == Durability.NONE or core.keeping is None:
            self._make_fork(command, request, served, fork_id, position, state)
            return
        created_at = core.now + core.wall_offset
        session = new_session(
            served,
            durability=durability,
            created_at=created_at,
            request_id=request_id,
            position=position,
            values=state,
        )
        claim = Claim(
            fork_id,
            served.info.name,
            ClaimMode.CREATE,
            created=created_row(fork_id, served.info.name, session, core.limits.idle_timeout_seconds),
        )

        def done(outcomes: Sequence[Outcome]) -> None:
            claimed = outcomes[0]
            assert isinstance(claimed, Claimed)
            if claimed.result is ClaimResult.CREATED:
                if (twin := core.sessions.row_by_id.get(fork_id)) is not None:
                    assert core.keeping is not None
                    core.keeping.lose(twin, MOVED)  # it was opened here meanwhile, and is not durable
                if core.sessions.num_free:
                    row = self._make_fork(command, request, served, fork_id, position, state, claimed.epoch)
                    core.sessions.durability[row] = durability
                    core.sessions.durable_position[row] = position
                    core.sessions.last_request[row] = LastRequest(request_id, claimed.epoch, position)
                else:  # it is stored, and comes when it is used
                    core.events.append(SessionForked(stream, request, fork_id, position, claimed.epoch))
            elif (first := first_answer(claimed.row, request_id)) is not None:
                core.events.append(SessionForked(stream, request, fork_id, first.position, first.epoch))
            else:
                refuse(_fork_exists(fork_id))

        core.keeping.ask([claim], done, refuse)

    def _make_fork(
        self,
        command: ForkSession,
        request: int,
        served: ServedModel,
        fork_id: str,
        position: int,
        state: FloatArray,
        epoch: int = 1,
    ) -> int:
        core, sessions = self._core, self._core.sessions
        copy = int(sessions.create([fork_id], served.index, NO_STREAM, core.now)[0])
        sessions.position[copy] = sessions.accepted[copy] = position
        sessions.epoch[copy] = epoch
        served.slots.replace_state(copy, state)
        core.statistics.models[served.index].sessions_opened += 1
        core.events.append(SessionForked(command.target.stream, request, fork_id, position, epoch))
        return copy

    def _check_fork(self, fork_id: str) -> Refusal | None:
        malformed = check_session_id(fork_id)
        if malformed is not None:
            return malformed
        if self._core.is_draining:
            return no_more_sessions()
        if fork_id in self._core.sessions.row_by_id:
            return _fork_exists(fork_id)
        return None if self._core.sessions.num_free else session_limit(self._core)

    def close(self, command: CloseSessions) -> None:
        """From now on ids and handles name nothing; the runs that were accepted before still run."""
        core, sessions, target = self._core, self._core.sessions, command.target
        for request, row in self._rows(target):
            durable = sessions.durability[row] != Durability.NONE
            trouble = self._trouble(row)
            if trouble is not None:
                core.refuse(target.stream, [request], [trouble])
                continue
            core.break_off_generation(row, Refusal(_CLOSED, "the session was closed"))
            if int(sessions.owner[row]) != target.stream:
                core.tell_owner(row, _CLOSED)
                sessions.owner[row] = NO_STREAM
            session_id = self._forget(row, _CLOSED)
            if durable:
                core.closing[session_id] = []
            core.wake(row)

            def execute(
                request: int = request, row: int = row, session_id: str = session_id, durable: bool = durable
            ) -> None:
                position = int(sessions.position[row])
                event = done_event(target.stream, request, 0, int(sessions.epoch[row]), position)
                told = self._free(row, _CLOSED)
                if not durable:
                    core.events.append(event)
                    return
                self._end_stored(target, session_id, _CLOSED, position, event, told)
                for go_on in core.closing.pop(session_id):
                    go_on()

            if sessions.next_run[row] == NO_RUN:
                sessions.is_in_store[row] = False  # the state of a session that ends need not be fetched
            core.when_idle(row, Operation(execute))

    def close_stored(self, command: CloseSessions, request: int, stored: Row) -> None:
        """End a stored session that cannot be made one of this server's."""
        event = done_event(command.target.stream, request, 0, 0, stored.position)
        self._end_stored(command.target, stored.session_id, _CLOSED, stored.position, event)

    def _end_stored(
        self,
        target: SessionTarget | None,
        session_id: str,
        reason: ErrorReason.ValueType,
        position: int,
        event: Done | None,
        told: Callable[[bool], None] | None = None,
    ) -> None:
        """Let the store know that a session has ended; then answer. told: gets whether it is stored."""
        core = self._core
        assert core.keeping is not None
        forget_at = core.now + core.wall_offset + core.limits.ended_session_memory_seconds
        request_id = "" if target is None else target.request_id

        def done(outcomes: Sequence[Outcome]) -> None:
            has_ended = outcomes[0] is not Written.FENCED
            if told is not None:
                told(has_ended)
            if event is None:
                return
            if not has_ended:
                core.refuse(event.stream, event.requests, [MOVED])
            else:
                core.events.append(event)

        core.keeping.ask([End(session_id, reason, request_id, position, forget_at)], done)

    def _forget(self, row: int, reason: ErrorReason.ValueType) -> str:
        """A session ends here: its id names nothing any more, and it is not written any more."""
        core, sessions = self._core, self._core.sessions
        sessions.is_leaving[row] = True
        sessions.is_dirty[row] = sessions.is_due[row] = False
        session_id = sessions.forget_id(row)
        if sessions.durability[row] == Durability.NONE:  # of the others the store knows, wherever they live again
            sessions.remember_ended(session_id, reason, core.now)
        return session_id

    def _trouble(self, row: int) -> Refusal | None:
        """Why a durable session cannot be changed now."""
        keeping = self._core.keeping
        durable = self._core.sessions.durability[row] != Durability.NONE
        return keeping.unavailable() if keeping is not None and durable else None

    def expire(self) -> None:
        """End sessions that were idle for too long; forget those that ended long ago."""
        core, sessions = self._core, self._core.sessions
        for row in sessions.idle_rows(core.now - core.limits.idle_timeout_seconds).tolist():
            durable, position = sessions.durability[row] != Durability.NONE, int(sessions.position[row])
            core.tell_owner(row, _EXPIRED)
            session_id = self._forget(row, _EXPIRED)
            told = self._free(row, _EXPIRED)
            if durable:
                self._end_stored(None, session_id, _EXPIRED, position, None, told)
        sessions.forget_ended(core.now - core.limits.ended_session_memory_seconds)

    def _free(self, row: int, reason: ErrorReason.ValueType) -> Callable[[bool], None] | None:
        """Free everything that an ended session still holds. Returns what must be told whether its end is stored."""
        core, sessions, served = self._core, self._core.sessions, self._core.model_of(row)
        told = None if core.keeping is None else core.keeping.end(row)
        served.runs.forget(row)
        served.slots.release(row)
        core.statistics.sessions_closed[reason_name(reason)] += 1
        core.statistics.session_lifetime.observe_one(core.now - float(sessions.created_at[row]))
        sessions.free(row)
        return told

    def get(self, command: GetSession) -> None:
        for request, row in self._rows(command.target):
            listed = SessionsListed(command.target.stream, request, [self._facts(row)], 1, more=False)
            self._core.events.append(listed)

    def list_page(self, command: ListSessions) -> None:
        keeping = self._core.keeping
        if keeping is None:
            self._list(command, [], 0)
            return

        def done(outcomes: Sequence[Outcome]) -> None:
            listed = outcomes[0]
            assert isinstance(listed, Listed)
            self._list(command, listed.rows, listed.total)

        def failed(refusal: Refusal) -> None:
            self._core.refuse(command.stream, [command.request], [refusal])

        keeping.ask([ListRows(command.model, command.after, command.page_size + 1)], done, failed)

    def _list(self, command: ListSessions, stored: Sequence[tuple[Row, int]], num_stored: int) -> None:
        """A page of what is here and what is stored; every durable session is stored, wherever it is."""
        core, row_by_id = self._core, self._core.sessions.row_by_id
        durability = core.sessions.durability
        here = [
            session_id
            for session_id, row in row_by_id.items()
            if (core.keeping is None or durability[row] == Durability.NONE)
            and (not command.model or core.model_of(row).info.name == command.model)
        ]
        stored_by_id = {row.session_id: (row, epoch) for row, epoch in stored}
        ids = itertools.chain((session_id for session_id in here if session_id > command.after), stored_by_id)
        following = heapq.nsmallest(command.page_size + 1, ids)
        facts = [
            self._facts(row_by_id[session_id])
            if session_id in row_by_id
            else self._stored_facts(*stored_by_id[session_id], read_stored(core, stored_by_id[session_id][0]))
            for session_id in following[: command.page_size]
        ]
        more = len(following) > len(facts)
        total = len(here) + num_stored
        core.events.append(SessionsListed(command.stream, command.request, facts, total, more=more))

    def _idle_rows(self, target: SessionTarget, *, changes: bool = False) -> Iterator[tuple[int, int]]:
        """(request, row) of the sessions meant on which no generate is under way; the others are refused.

        changes: the session is written through. Where it was this very call that changed it last, it is answered again.
        """
        core = self._core
        for request, row in self._rows(target):
            last = core.sessions.last_request.get(row)
            if changes and target.request_id and last is not None and last.request_id == target.request_id:
                self._answer_again(target, request, row, last)
            elif row in core.generations:
                core.refuse(target.stream, [request], [_BUSY])
            elif changes and (trouble := self._trouble(row)) is not None:
                core.refuse(target.stream, [request], [trouble])
            elif core.sessions.num_unfinished[row] >= core.limits.max_session_pending_tokens:
                core.refuse(target.stream, [request], [_FULL])
            else:
                yield request, row

    def _answer_again(self, target: SessionTarget, request: int, row: int, last: LastRequest) -> None:
        """Answer a repeat as the call itself was: not before what it changed is stored."""
        core = self._core
        event = done_event(target.stream, request, 0, last.epoch, last.position)
        if core.keeping is None or not core.sessions.num_writes[row]:
            core.events.append(event)
        else:
            refuse = self._refuser(target, request)
            core.when_idle(row, Operation(lambda: self._stored(row, event), refuse=refuse))

    def _rows(self, target: SessionTarget) -> Iterator[tuple[int, int]]:
        """(request, row) of the sessions meant; the others are refused.

        Each is looked up only when those before it are done: a handle that stands twice is stale the second time.
        """
        core, sessions = self._core, self._core.sessions
        for place, request in enumerate(target.requests.tolist()):
            row: int | Refusal
            if target.handles is not None:
                rows, valid = sessions.resolve_handles(target.stream, target.handles[place : place + 1])
                handle = int(target.handles[place])
                row = int(rows[0]) if valid[0] else sessions.refuse_handle(target.stream, handle)
            else:
                assert target.session_ids is not None
                row = sessions.resolve_id(target.session_ids[place])
            if isinstance(row, Refusal):
                core.refuse(target.stream, [request], [row])
            else:
                yield request, row

    def answer_from_store(
        self, command: GetSession | ExportSession | ForkSession, request: int, row: Row, epoch: int, read: StoredSession
    ) -> None:
        """Answer what only looks at a session out of its row, which may be another server's."""
        core, stream = self._core, command.target.stream
        match command:
            case GetSession():
                facts = [self._stored_facts(row, epoch, read)]
                core.events.append(SessionsListed(stream, request, facts, 1, more=False))
            case ExportSession():
                state = InitialState(read.fingerprint, read.position, read.state())
                core.events.append(StateExported(stream, request, state))
            case ForkSession():
                served = next(served for served in core.served if served.info.name == row.model)
                self._fork(command, request, served, read.durability, read.position, read.state())

    def _facts(self, row: int) -> SessionFacts:
        core, sessions = self._core, self._core.sessions
        info = core.model_of(row).info
        session_id = sessions.ids[row]
        assert session_id is not None
        durable = sessions.durability[row] != Durability.NONE
        tier = Tier.DEVICE if sessions.slot[row] != NO_SLOT else Tier.HOST
        return SessionFacts(
            session_id=session_id,
            model=info.name,
            model_version=info.version,
            position=int(sessions.position[row]),
            epoch=int(sessions.epoch[row]),
            num_pending_tokens=int(sessions.num_pending_tokens[row]),
            durability=int(sessions.durability[row]),  # type: ignore[arg-type]
            durable_position=int(sessions.durable_position[row]) if durable else None,
            tier=Tier.STORE if sessions.is_in_store[row] else tier,
            attached=int(sessions.owner[row]) != NO_STREAM,
            generating=bool(sessions.is_generating[row]),
            idle_seconds=core.now - float(sessions.last_used[row]),
            age_seconds=core.now - float(sessions.created_at[row]),
            marks=[(name, position) for name, (position, _) in sessions.marks.get(row, {}).items()],
        )

    def _stored_facts(self, row: Row, epoch: int, read: StoredSession | Refusal) -> SessionFacts:
        """The same of a session that is only in the store; less of one whose row cannot be read."""
        core = self._core
        now = core.now + core.wall_offset
        served = next((served for served in core.served if served.info.name == row.model), None)
        known = None if isinstance(read, Refusal) else read
        return SessionFacts(
            session_id=row.session_id,
            model=row.model,
            model_version=0 if served is None else served.info.version,
            position=row.position,
            epoch=epoch,
            num_pending_tokens=0,
            durability=2 if known is None else known.durability,  # type: ignore[arg-type]
            durable_position=row.position,
            tier=Tier.STORE,
            attached=False,
            generating=False,
            idle_seconds=max(0.0, now - (row.expires_at - core.limits.idle_timeout_seconds)),
            age_seconds=0.0 if known is None else max(0.0, now - known.created_at),
            marks=[] if known is None else stored_marks(row, known),
        )


def done_event(stream: int, request: int, handle: int, epoch: int, position: int) -> Done:
    """That an operation on one session is done."""
    requests, handles = np.array([request], np.uint64), np.array([handle], np.uint64)
    return Done(stream, requests, handles, np.array([epoch]), np.array([position]))


def _fork_exists(fork_id: str) -> Refusal:
    message = f"session {fork_id!r} exists"
    return Refusal(ErrorReason.ERROR_REASON_SESSION_EXISTS, message, field="fork_session_id")
