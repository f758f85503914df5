"""The plain sessions: how they are opened, taken over, withdrawn from and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import InitialState
from tests.service.plain_sessions import Grip, PlainGenerate, PlainOperation, PlainRun, PlainSession
from tests.service.records import Record
from tests.support.steppers import FakeModel

__all__ = ["PlainSessions"]


class PlainSessions:
    """All sessions, and the records that the engine must have said: `expected`, with the grip that each tells."""

    def __init__(self, models: Sequence[FakeModel], limits: EngineLimits, row_of: Callable[[str], int]) -> None:
        self.row_of = row_of  # the engine's row of an id, so that its ticks can be read
        self.models = {model.name: model for model in models}
        self.limits = limits
        self.now = 0.0
        self.sessions: dict[str, PlainSession] = {}
        self.closing: list[PlainSession] = []  # closed, with runs to finish
        self.ended: dict[str, tuple[str, float]] = {}
        self.grips: list[Grip] = []
        self.streams: set[int] = set()
        self.paused: set[int] = set()
        self.draining = False
        self.expected: list[tuple[Record, Grip | None]] = []

    @property
    def everything(self) -> list[PlainSession]:
        return [*self.sessions.values(), *self.closing]

    def say(self, kind: str, stream: int, request: int, *facts: object, grip: Grip | None = None) -> None:
        self.expected.append((Record(kind, stream, request, facts), grip))

    def refuse(self, stream: int, request: int, reason: str, position: int = 0) -> None:
        self.say("failed", stream, request, reason, position)

    # Finding sessions.

    def by_handle(self, stream: int, handle: int) -> PlainSession | str:
        grip = next((grip for grip in self.grips if grip.handle == handle), None)
        if grip is None or grip.stream != stream:
            return "STALE_HANDLE"
        if grip.session.grip is grip:
            return grip.session
        return "SESSION_MOVED" if grip.moved else "STALE_HANDLE"

    def by_id(self, session_id: str) -> PlainSession | str:
        if session_id in self.sessions:
            return self.sessions[session_id]
        return self.ended[session_id][0] if session_id in self.ended else "SESSION_NOT_FOUND"

    # Opening and ending.

    def open(
        self,
        stream: int,
        requests: Sequence[int],
        ids: Sequence[str],
        model: str,
        mode: int,
        states: Sequence[InitialState] | None,
        *,
        all_or_none: bool,
        attach: bool,
    ) -> None:
        """Open ids; all places are told of at once, when the last generate of them that was in a tick is over."""
        refused = self._refused_opens(ids, model, mode, states)
        if refused and all_or_none:
            self.refuse(stream, requests[0], refused[min(refused)])
            return
        for place, reason in refused.items():
            self.refuse(stream, requests[place], reason)
        self._make_room(
            [name for place, name in enumerate(ids) if place not in refused and name not in self.sessions], ids
        )
        opened: dict[int, Callable[[], None]] = {}
        missing = len(ids) - len(refused)

        def settle(place: int, session: PlainSession, grip: Grip | None, epoch: int, created: bool) -> None:
            nonlocal missing
            facts = (session.id, session.accepted, epoch, created)
            opened[place] = lambda: self.say("opened", stream, requests[place], *facts, grip=grip)
            missing -= 1
            if not missing:
                for tell in opened.values():
                    tell()

        for place, session_id in enumerate(ids):
            if place in refused:
                continue
            session = self.sessions.get(session_id)
            created = session is None
            if session is None:
                state = None if states is None else states[place]
                session = self.create(session_id, self.models[model], stream if attach else 0, state)
            else:
                self.take_over(session, stream if attach else 0)
            told = (place, session, session.grip, session.epoch, created)
            if session.generate is None:
                settle(*told)
            else:
                self.when_idle(session, lambda told=told: settle(*told))  # type: ignore[misc]

    def _refused_opens(
        self, ids: Sequence[str], model: str, mode: int, states: Sequence[InitialState] | None
    ) -> dict[int, str]:
        if model not in self.models:
            return dict.fromkeys(range(len(ids)), "MODEL_NOT_FOUND")
        if self.draining:
            return dict.fromkeys(range(len(ids)), "DRAINING")
        if mode == OpenMode.OPEN_MODE_RESUME:  # the driver gives no marks
            return dict.fromkeys(range(len(ids)), "INVALID_INPUT")
        refused: dict[int, str] = {}
        num_left = self.limits.max_sessions - len(self.everything) + len(self._evictable(ids))
        for place, session_id in enumerate(ids):
            found = self.by_id(session_id)
            if session_id in ids[:place]:
                refused[place] = "INVALID_INPUT"
            elif states is not None and states[place].fingerprint != self.models[model].fingerprint:
                refused[place] = "STATE_MISMATCH"
            elif isinstance(found, str) and mode == OpenMode.OPEN_MODE_ATTACH:
                refused[place] = found
            elif isinstance(found, str):
                num_left -= 1
                if num_left < 0:
                    refused[place] = "SESSION_LIMIT"
            elif mode == OpenMode.OPEN_MODE_CREATE or states is not None or found.model.name != model:
                refused[place] = "SESSION_EXISTS"
        return refused

    def _evictable(self, keep: Sequence[str]) -> list[PlainSession]:
        """Idle sessions that make room, the longest idle first."""
        idle = [session for session in self.sessions.values() if not session.chain and session.id not in keep]
        return sorted(idle, key=lambda s: (s.last_used, s.row)) if self.limits.evict_when_full else []

    def _make_room(self, new: Sequence[str], keep: Sequence[str]) -> None:
        missing = len(self.everything) + len(new) - self.limits.max_sessions
        for session in self._evictable(keep)[: max(missing, 0)]:
            self._end(session, "SESSION_EVICTED")

    def create(self, session_id: str, model: FakeModel, stream: int, state: InitialState | None) -> PlainSession:
        values = model.zero_state() if state is None else state.values
        position = 0 if state is None else state.position
        session = PlainSession(session_id, model, self.row_of(session_id), values, position, position, self.now)
        self.sessions[session_id] = session
        self.ended.pop(session_id, None)
        self._hold(session, stream)
        return session

    def take_over(self, session: PlainSession, stream: int) -> None:
        """A stream, or nobody (0), gets the session; what waits of others is withdrawn."""
        self.break_off(session, "SESSION_MOVED")
        waiting = [entry for entry in session.chain if isinstance(entry, PlainRun) and not entry.begun]
        same = stream != 0 and session.owner == stream
        self.withdraw(
            session, {run: "STALE_HANDLE" if same and run.stream == stream else "SESSION_MOVED" for run in waiting}
        )
        self._new_epoch(session, stream, "SESSION_MOVED")
        session.last_used = self.now

    def _new_epoch(self, session: PlainSession, stream: int, reason: str) -> None:
        grip = session.grip
        if grip is not None and session.owner not in (0, stream):
            self.say("ended", session.owner, 0, reason, grip=grip)
            grip.moved = reason == "SESSION_MOVED"
        session.epoch += 1
        self._hold(session, stream)

    def _hold(self, session: PlainSession, stream: int) -> None:
        session.owner = stream
        session.grip = Grip(session, stream)
        self.grips.append(session.grip)

    def when_idle(self, session: PlainSession, act: Callable[[], None], position: int | None = None) -> None:
        if position is not None:
            session.accepted = position
        session.chain.append(PlainOperation(act, position))
        self.settle(session)

    def settle(self, session: PlainSession) -> None:
        """Do the operations that have come to the front."""
        while session.chain and isinstance(session.chain[0], PlainOperation):
            session.chain.pop(0).act()  # type: ignore[union-attr]

    def replace(self, session: PlainSession, stream: int, request: int, state: InitialState | None) -> None:
        """Reset or import."""
        position = 0 if state is None else state.position
        self._new_epoch(session, session.owner if session.owner == stream else 0, "STALE_HANDLE")
        grip, epoch = session.grip, session.epoch

        def act() -> None:
            session.held.clear()
            session.state = session.model.zero_state() if state is None else state.values
            session.position = position
            session.last_used = self.now
            self.say("done", stream, request, epoch, position, False, grip=grip)

        self.when_idle(session, act, position)

    def fork(self, session: PlainSession, stream: int, request: int, fork_id: str) -> None:
        def act() -> None:
            if self.draining:
                self.refuse(stream, request, "DRAINING")
            elif fork_id in self.sessions:
                self.refuse(stream, request, "SESSION_EXISTS")
            elif len(self.everything) >= self.limits.max_sessions and not self._evictable([session.id]):
                self.refuse(stream, request, "SESSION_LIMIT")
            else:
                self._make_room([fork_id], [session.id])
                state = InitialState(b"", session.position, session.state)
                self.create(fork_id, session.model, 0, state)
                self.say("forked", stream, request, fork_id, session.position, 1)

        self.when_idle(session, act)

    def export(self, session: PlainSession, stream: int, request: int) -> None:
        def act() -> None:
            facts = (session.model.fingerprint, session.position, session.state.tobytes())
            self.say("exported", stream, request, *facts)

        self.when_idle(session, act)

    def close(self, session: PlainSession, stream: int, request: int, *, evicts: bool = False) -> None:
        reason = "SESSION_EVICTED" if evicts else "SESSION_CLOSED"
        self.break_off(session, reason)
        if session.owner != stream:
            if session.owner:
                self.say("ended", session.owner, 0, reason, grip=session.grip)
            session.owner = 0
        self._forget(session, reason)
        self.closing.append(session)

        def act() -> None:
            self.say("done", stream, request, session.epoch, session.position, True)
            session.ended = True
            self.closing.remove(session)

        self.when_idle(session, act)

    def _forget(self, session: PlainSession, reason: str) -> None:
        del self.sessions[session.id]
        self.ended[session.id] = (reason, self.now)
        session.grip = None

    def _end(self, session: PlainSession, reason: str) -> None:
        if session.owner:
            self.say("ended", session.owner, 0, reason, grip=session.grip)
        self._forget(session, reason)
        session.ended = True

    def sweep(self) -> None:
        for session in list(self.sessions.values()):
            if not session.chain and session.last_used < self.now - self.limits.idle_timeout_seconds:
                self._end(session, "SESSION_EXPIRED")
        horizon = self.now - self.limits.ended_session_memory_seconds
        self.ended = {name: (why, at) for name, (why, at) in self.ended.items() if at >= horizon}

    # Withdrawing.

    def withdraw(self, session: PlainSession, victims: dict[PlainRun | PlainGenerate, str]) -> None:
        """Take entries out of the chain; the runs after them, up to a reset, are refused as a gap."""
        position, gap = session.position, False
        removed: list[tuple[PlainRun | PlainGenerate, str]] = []
        for entry in session.chain:
            if isinstance(entry, PlainOperation):
                if entry.position is not None:
                    position, gap = entry.position, False
            elif entry in victims:
                removed.append((entry, victims[entry]))
                gap = True
            elif gap:
                removed.append((entry, "POSITION_GAP"))
            elif isinstance(entry, PlainRun):
                position = entry.start + len(entry.tokens)
        session.accepted = position
        gone = [entry for entry, _ in removed]
        session.chain = [entry for entry in session.chain if entry not in gone]
        for entry, reason in removed:
            told = position if reason == "POSITION_GAP" else 0
            caller = entry.command if isinstance(entry, PlainGenerate) else entry
            self.refuse(caller.stream, caller.request, reason, told)
            for repeat in entry.joined if isinstance(entry, PlainRun) else ():
                self.refuse(repeat.stream, repeat.request, reason, told)
        self.settle(session)

    def give_up(self, session: PlainSession, runs: Sequence[PlainRun], reason: str) -> None:
        """Callers want runs no more; somebody who has joined one keeps it."""
        victims: dict[PlainRun | PlainGenerate, str] = {}
        for run in runs:
            if run.joined:
                self.refuse(run.stream, run.request, reason)
                heir = run.joined.pop(0)
                run.stream, run.request, run.deadline = heir.stream, heir.request, heir.deadline
            else:
                victims[run] = reason
        self.withdraw(session, victims)

    def cancel(self, stream: int, requests: set[int] | None) -> None:
        """Requests of a stream, or all of them, are wanted no more."""

        def is_meant(other: int, request: int) -> bool:
            return other == stream and (requests is None or request in requests)

        for session in self.everything:
            for run in [entry for entry in session.chain if isinstance(entry, PlainRun) and not entry.begun]:
                for repeat in [repeat for repeat in run.joined if is_meant(repeat.stream, repeat.request)]:
                    run.joined.remove(repeat)
                    self.refuse(stream, repeat.request, "RUN_CANCELLED")
            generate = session.generate
            if generate is not None:
                successor = generate.successor
                if successor is not None and is_meant(successor.stream, successor.request):
                    generate.successor = None
                    self.refuse(stream, successor.request, "RUN_CANCELLED")
                elif successor is None and is_meant(generate.command.stream, generate.command.request):
                    self.break_off(session, "RUN_CANCELLED")
            waiting = [entry for entry in session.chain if isinstance(entry, PlainRun) and not entry.begun]
            self.give_up(session, [run for run in waiting if is_meant(run.stream, run.request)], "RUN_CANCELLED")

    def end_stream(self, stream: int) -> None:
        self.streams.discard(stream)
        self.paused.discard(stream)
        for session in self.everything:
            if session.owner == stream:
                session.owner = 0
        self.cancel(stream, None)

    def break_off(self, session: PlainSession, reason: str) -> None:
        generate = session.generate
        if generate is None:
            return
        if generate.successor is not None:
            self.refuse(generate.successor.stream, generate.successor.request, reason)
            generate.successor = None
        if session.in_tick and session.chain[0] is generate:
            generate.broken_off = generate.broken_off or reason
        else:
            self.withdraw(session, {generate: reason})
