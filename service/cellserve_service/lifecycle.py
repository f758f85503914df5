"""What happens to an open session beside running: reset, import, export, fork, close, expiry, listing."""

import heapq
from collections.abc import Iterator

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.messages import (
    CloseSessions,
    Done,
    ExportSession,
    ForkSession,
    GetSession,
    ImportSession,
    InitialState,
    ListSessions,
    ResetSessions,
    SessionFacts,
    SessionForked,
    SessionsListed,
    SessionTarget,
    StateExported,
)
from cellserve_service.opening import (
    check_session_id,
    check_state,
    new_session_id,
    no_more_sessions,
    session_limit,
)
from cellserve_service.sessions import NO_SLOT, NO_STREAM

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
        for request, row in self._idle_rows(command.target):
            self._replace(command.target, request, row, position=0, state=None)

    def import_state(self, command: ImportSession) -> None:
        for request, row in self._idle_rows(command.target):
            mismatch = check_state(self._core.model_of(row).info, command.state)
            if mismatch is not None:
                self._core.refuse(command.target.stream, [request], [mismatch])
            else:
                self._replace(command.target, request, row, command.state.position, command.state)

    def _replace(
        self, target: SessionTarget, request: int, row: int, position: int, state: InitialState | None
    ) -> None:
        """Give the session another state and a new epoch. Its handles are stale at once, whenever that happens."""
        core, sessions = self._core, self._core.sessions
        owner = int(sessions.owner[row])
        core.begin_epoch(row, owner if owner == target.stream else NO_STREAM, _STALE)
        handle, epoch = int(sessions.handle[row]), int(sessions.epoch[row])

        def execute() -> None:
            served = core.model_of(row)
            served.runs.forget(row)
            served.slots.replace_state(row, None if state is None else state.values)
            sessions.position[row] = position
            sessions.last_used[row] = core.now
            self._done(target, request, handle, epoch, position)

        core.when_idle(row, Operation(execute, position))

    def export(self, command: ExportSession) -> None:
        core, stream = self._core, command.target.stream
        for request, row in self._idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                served = core.model_of(row)
                position = int(core.sessions.position[row])
                state = InitialState(served.info.fingerprint, position, served.slots.state(row))
                core.events.append(StateExported(stream, request, state))

            core.when_idle(row, Operation(execute))

    def fork(self, command: ForkSession) -> None:
        for request, row in self._idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                self._fork(command, request, row)

            self._core.when_idle(row, Operation(execute))

    def _fork(self, command: ForkSession, request: int, row: int) -> None:
        core, sessions, stream = self._core, self._core.sessions, command.target.stream
        fork_id = command.fork_id or new_session_id()
        refusal = self._check_fork(fork_id)
        if refusal is not None:
            core.statistics.sessions_rejected[reason_name(refusal.reason)] += 1
            core.refuse(stream, [request], [refusal])
            return
        served = core.model_of(row)
        position = int(sessions.position[row])
        copy = int(sessions.create([fork_id], served.index, NO_STREAM, core.now)[0])
        sessions.position[copy] = sessions.accepted[copy] = position
        served.slots.replace_state(copy, served.slots.state(row))
        core.statistics.models[served.index].sessions_opened += 1
        core.events.append(SessionForked(stream, request, fork_id, position, int(sessions.epoch[copy])))

    def _check_fork(self, fork_id: str) -> Refusal | None:
        malformed = check_session_id(fork_id)
        if malformed is not None:
            return malformed
        if self._core.is_draining:
            return no_more_sessions()
        if fork_id in self._core.sessions.row_by_id:
            message = f"session {fork_id!r} exists"
            return Refusal(ErrorReason.ERROR_REASON_SESSION_EXISTS, message, field="fork_session_id")
        return None if self._core.sessions.num_free else session_limit(self._core)

    def close(self, command: CloseSessions) -> None:
        """From now on ids and handles name nothing; the runs that were accepted before still run."""
        core, sessions, target = self._core, self._core.sessions, command.target
        for request, row in self._rows(target):
            core.break_off_generation(row, Refusal(_CLOSED, "the session was closed"))
            if int(sessions.owner[row]) != target.stream:
                core.tell_owner(row, _CLOSED)
                sessions.owner[row] = NO_STREAM
            sessions.forget_id(row, _CLOSED, core.now)
            core.wake(row)

            def execute(request: int = request, row: int = row) -> None:
                self._done(target, request, 0, int(sessions.epoch[row]), int(sessions.position[row]))
                self._free(row, _CLOSED)

            core.when_idle(row, Operation(execute))

    def expire(self) -> None:
        """End sessions that were idle for too long; forget those that ended long ago."""
        core, sessions = self._core, self._core.sessions
        for row in sessions.idle_rows(core.now - core.limits.idle_timeout_seconds).tolist():
            core.tell_owner(row, _EXPIRED)
            sessions.forget_id(row, _EXPIRED, core.now)
            self._free(row, _EXPIRED)
        sessions.forget_ended(core.now - core.limits.ended_session_memory_seconds)

    def _free(self, row: int, reason: ErrorReason.ValueType) -> None:
        """Free everything that an ended session still holds."""
        core, sessions, served = self._core, self._core.sessions, self._core.model_of(row)
        served.runs.forget(row)
        served.slots.release(row)
        core.statistics.sessions_closed[reason_name(reason)] += 1
        core.statistics.session_lifetime.observe_one(core.now - float(sessions.created_at[row]))
        sessions.free(row)

    def get(self, command: GetSession) -> None:
        for request, row in self._rows(command.target):
            listed = SessionsListed(command.target.stream, request, [self._facts(row)], 1, more=False)
            self._core.events.append(listed)

    def list_page(self, command: ListSessions) -> None:
        row_by_id = self._core.sessions.row_by_id
        of_model = [
            session_id
            for session_id, row in row_by_id.items()
            if not command.model or self._core.model_of(row).info.name == command.model
        ]
        following = heapq.nsmallest(
            command.page_size + 1, (session_id for session_id in of_model if session_id > command.after)
        )
        facts = [self._facts(row_by_id[session_id]) for session_id in following[: command.page_size]]
        more = len(following) > len(facts)
        self._core.events.append(SessionsListed(command.stream, command.request, facts, len(of_model), more=more))

    def _done(self, target: SessionTarget, request: int, handle: int, epoch: int, position: int) -> None:
        requests, handles = np.array([request], np.uint64), np.array([handle], np.uint64)
        self._core.events.append(Done(target.stream, requests, handles, np.array([epoch]), np.array([position])))

    def _idle_rows(self, target: SessionTarget) -> Iterator[tuple[int, int]]:
        """(request, row) of the sessions meant on which no generate is under way; the others are refused."""
        core = self._core
        for request, row in self._rows(target):
            if row in core.generations:
                core.refuse(target.stream, [request], [_BUSY])
            elif core.sessions.num_unfinished[row] >= core.limits.max_session_pending_tokens:
                core.refuse(target.stream, [request], [_FULL])
            else:
                yield request, row

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

    def _facts(self, row: int) -> SessionFacts:
        core, sessions = self._core, self._core.sessions
        info = core.model_of(row).info
        session_id = sessions.ids[row]
        assert session_id is not None
        return SessionFacts(
            session_id=session_id,
            model=info.name,
            model_version=info.version,
            position=int(sessions.position[row]),
            epoch=int(sessions.epoch[row]),
            num_pending_tokens=int(sessions.num_pending_tokens[row]),
            on_device=int(sessions.slot[row]) != NO_SLOT,
            attached=int(sessions.owner[row]) != NO_STREAM,
            idle_seconds=core.now - float(sessions.last_used[row]),
            age_seconds=core.now - float(sessions.created_at[row]),
        )
