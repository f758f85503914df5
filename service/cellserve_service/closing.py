"""Ends sessions: those that are closed, that were idle for too long, and that are evicted."""

from collections.abc import Callable, Sequence

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.messages import CloseSessions, Done, SessionTarget
from cellserve_service.sessions import ENDED_MESSAGE, NO_RUN, NO_STREAM
from cellserve_service.store_requests import MOVED
from cellserve_service.stores.operations import End, Outcome, Row, Written
from cellserve_service.targets import Targets, done_event

# What one turn of the engine does of it: a few milliseconds, so that a million sessions that end at once never hold up
# the ticks.
MAX_TURN_ENDINGS = 128
MAX_TURN_FORGOTTEN = 4096

_CLOSED = ErrorReason.ERROR_REASON_SESSION_CLOSED
_EXPIRED = ErrorReason.ERROR_REASON_SESSION_EXPIRED
_EVICTED = ErrorReason.ERROR_REASON_SESSION_EVICTED
_STALE = ErrorReason.ERROR_REASON_STALE_HANDLE


class Closing:
    """Ends sessions, here and in the store."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._targets = Targets(core)

    def close(self, command: CloseSessions) -> None:
        """From now on ids and handles name nothing; the runs that were accepted before still run."""
        core, sessions, target = self._core, self._core.sessions, command.target
        reason = _EVICTED if command.evicts else _CLOSED
        for request, row in self._targets.rows(target):
            durable = sessions.is_durable(row)
            trouble = self._targets.trouble(row)
            if trouble is not None:
                core.refuse(target.stream, [request], [trouble])
                continue
            core.break_off_generation(row, Refusal(reason, f"the session {ENDED_MESSAGE[reason]}"))
            if int(sessions.owner[row]) != target.stream:
                core.tell_owner(row, reason)
                sessions.owner[row] = NO_STREAM
            session_id = self._forget(row, reason)
            if durable:
                core.closing[session_id] = []
            core.wake(row)

            def execute(
                request: int = request, row: int = row, session_id: str = session_id, durable: bool = durable
            ) -> None:
                position = int(sessions.position[row])
                event = done_event(target.stream, request, 0, int(sessions.epoch[row]), position)
                told = self._free(row, reason)
                if not durable:
                    core.events.append(event)
                    return
                self._end_stored(target, session_id, reason, position, event, told)
                for go_on in core.closing.pop(session_id):
                    go_on()

            if sessions.next_run[row] == NO_RUN:
                sessions.is_in_store[row] = False  # the state of a session that ends need not be fetched
            core.when_idle(row, Operation(execute))

    def close_stored(self, command: CloseSessions, request: int, stored: Row) -> None:
        """End a stored session that cannot be made one of this server's."""
        event = done_event(command.target.stream, request, 0, 0, stored.position)
        reason = _EVICTED if command.evicts else _CLOSED
        self._end_stored(command.target, stored.session_id, reason, stored.position, event)

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
        core, keeping = self._core, self._core.keeping
        assert keeping is not None
        forget_at = core.now + core.wall_offset + core.limits.ended_session_memory_seconds
        request_id = "" if target is None else target.request_id

        def done(outcomes: Sequence[Outcome]) -> None:
            keeping.ending.remove(session_id)
            has_ended = outcomes[0] is not Written.FENCED
            if told is not None:
                told(has_ended)
            if event is None:
                return
            if not has_ended:
                core.refuse(event.stream, event.requests, [MOVED])
            else:
                core.events.append(event)

        keeping.ending.append(session_id)
        keeping.ask([End(session_id, reason, request_id, position, forget_at)], done)

    def _forget(self, row: int, reason: ErrorReason.ValueType) -> str:
        """A session ends here: its id names nothing any more, and it is not written any more."""
        core, sessions = self._core, self._core.sessions
        sessions.is_leaving[row] = True
        sessions.is_dirty[row] = sessions.is_due[row] = False
        session_id = sessions.forget_id(row)
        if not sessions.is_durable(row):  # of the others the store knows, wherever they live again
            sessions.remember_ended(session_id, reason, core.now)
        return session_id

    def expire(self) -> bool:
        """End sessions that were idle for too long, and forget those that ended long ago: as much as a turn takes.

        Returns whether there is more to do.
        """
        core, sessions = self._core, self._core.sessions
        rows, more_idle = sessions.take_idle(core.now - core.limits.idle_timeout_seconds, MAX_TURN_ENDINGS)
        core.tell_owners(rows, _EXPIRED)
        for row in rows.tolist():
            self._end(row, _EXPIRED)
        more_ended = sessions.forget_ended(core.now - core.limits.ended_session_memory_seconds, MAX_TURN_FORGOTTEN)
        return more_idle or more_ended

    def evict(self, row: int) -> None:
        """Make an idle session give up its place: one that the store has is left to it, another one ends."""
        core, sessions = self._core, self._core.sessions
        if core.keeping is None or not sessions.is_durable(row):
            core.tell_owner(row, _EVICTED)
            self._end(row, _EVICTED)
        else:
            core.tell_owner(row, _STALE)
            sessions.owner[row] = NO_STREAM
            core.keeping.unload(row)

    def _end(self, row: int, reason: ErrorReason.ValueType) -> None:
        """End an idle session that nobody has asked to end; its owner is told."""
        durable, position = self._core.sessions.is_durable(row), int(self._core.sessions.position[row])
        session_id = self._forget(row, reason)
        told = self._free(row, reason)
        if durable:
            self._end_stored(None, session_id, reason, position, None, told)

    def _free(self, row: int, reason: ErrorReason.ValueType) -> Callable[[bool], None] | None:
        """Free everything that an ended session still holds. Returns what must be told whether its end is stored."""
        core, sessions, served = self._core, self._core.sessions, self._core.model_of(row)
        told = None if core.keeping is None else core.keeping.withholding.end(row)
        served.runs.forget(row)
        served.slots.release(row)
        core.statistics.sessions_closed[reason_name(reason)] += 1
        core.statistics.session_lifetime.observe_one(core.now - float(sessions.created_at[row]))
        sessions.free(row)
        return told
