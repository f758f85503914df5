"""Forks sessions: a new session that begins where another one stands."""

from collections.abc import Sequence

from cellserve_service.adoption import first_answer
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.messages import ForkSession, InitialState, SessionForked
from cellserve_service.new_sessions import (
    check_session_id,
    exists,
    first_row,
    made_id,
    no_more_sessions,
    session_limit,
)
from cellserve_service.room import Room
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_STREAM, Durability
from cellserve_service.stepping import FloatArray
from cellserve_service.store_requests import MOVED
from cellserve_service.stores.operations import Claim, Claimed, ClaimMode, ClaimResult, Outcome
from cellserve_service.stores.rows import LastRequest
from cellserve_service.targets import Targets


class Forking:
    """Makes forks of sessions that are here, and of stored ones."""

    def __init__(self, core: Core, room: Room) -> None:
        self._core = core
        self._room = room
        self._targets = Targets(core)

    def fork(self, command: ForkSession) -> None:
        core, sessions = self._core, self._core.sessions
        for request, row in self._targets.idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                served = core.model_of(row)
                state, position = served.slots.state(row), int(sessions.position[row])
                self.fork_from(command, request, served, int(sessions.durability[row]), position, state)

            core.when_idle(row, Operation(execute, refuse=self._targets.refuser(command.target, request)))

    def fork_from(
        self, command: ForkSession, request: int, served: ServedModel, durability: int, position: int, state: FloatArray
    ) -> None:
        core, stream = self._core, command.target.stream
        request_id, sources = command.target.request_id, command.target.session_ids or ()
        fork_id = command.fork_id or made_id(request_id, "".join(sources))

        def refuse(refusal: Refusal) -> None:
            core.statistics.sessions_rejected[reason_name(refusal.reason)] += 1
            core.refuse(stream, [request], [refusal])

        here = core.sessions.row_by_id.get(fork_id)
        first = None if here is None else core.sessions.last_request.get(here)
        if first is not None and request_id and first.request_id == request_id:
            core.events.append(SessionForked(stream, request, fork_id, first.position, first.epoch))
            return
        is_durable = durability != Durability.NONE and core.keeping is not None
        refusal = self._check_fork(fork_id, sources, is_durable=is_durable)
        if refusal is not None:
            refuse(refusal)
            return
        if not is_durable or core.keeping is None:
            self._room.make(1, sources)
            self._make_fork(command, request, served, fork_id, position, state)
            return
        created = first_row(
            core,
            served,
            fork_id,
            durability=durability,
            request_id=request_id,
            state=InitialState(served.info.fingerprint, position, state),
        )
        claim = Claim(fork_id, served.info.name, ClaimMode.CREATE, created=created)

        def done(outcomes: Sequence[Outcome]) -> None:
            claimed = outcomes[0]
            assert isinstance(claimed, Claimed)
            if claimed.result is ClaimResult.CREATED:
                if (twin := core.sessions.row_by_id.get(fork_id)) is not None:
                    assert core.keeping is not None
                    core.keeping.lose(twin, MOVED)  # it was opened here meanwhile, and is not durable
                if self._room.make(1, sources):
                    row = self._make_fork(command, request, served, fork_id, position, state, claimed.epoch)
                    core.sessions.keep(row, durability)
                    core.sessions.last_request[row] = LastRequest(request_id, claimed.epoch, position)
                else:  # it is stored, and comes when it is used
                    core.events.append(SessionForked(stream, request, fork_id, position, claimed.epoch))
            elif (first := first_answer(claimed.row, request_id)) is not None:
                core.events.append(SessionForked(stream, request, fork_id, first.position, first.epoch))
            else:
                refuse(exists(f"session {fork_id!r} exists", "fork_session_id"))

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

    def _check_fork(self, fork_id: str, sources: Sequence[str], *, is_durable: bool) -> Refusal | None:
        malformed = check_session_id(fork_id)
        if malformed is not None:
            return malformed
        if self._core.is_draining:
            return no_more_sessions()
        sessions = self._core.sessions
        twin = sessions.row_by_id.get(fork_id)
        # Of durable sessions the store knows: the one here may have ended elsewhere.
        if twin is not None and not (is_durable and sessions.is_durable(twin)):
            return exists(f"session {fork_id!r} exists", "fork_session_id")
        return None if self._room.left(1, sources) else session_limit(self._core)
