"""Gives sessions that are opened to the stream that opens them, and tells it how they stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.messages import Opened, OpenSessions
from cellserve_service.open_checks import holder_of
from cellserve_service.sessions import NO_STREAM, Durability

_MOVED = Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, "the session was taken over")
_ATTACHED_AGAIN = Refusal(ErrorReason.ERROR_REASON_STALE_HANDLE, "the session was attached again on this stream")


@dataclass(slots=True)
class OpenedRow:
    """A session that is opened, as it stands then."""

    place: int
    session_id: str
    row: int
    created: bool
    claimed_epoch: int = 0  # by the store; 0: the session is not durable
    adopted: bool = False  # it came from the store, in its new epoch
    handle: int = 0
    epoch: int = 0
    position: int = 0
    durable_position: int = 0
    durability: int = Durability.NONE


@dataclass(frozen=True, slots=True)
class ToldRow:
    """A session that an earlier call of the same request id has made, as that was answered."""

    place: int
    session_id: str
    epoch: int
    position: int
    durability: int
    created: bool = True
    handle: int = 0

    @property
    def durable_position(self) -> int:
        return self.position


class TakingOver:
    """Creates sessions, takes over those that exist, and answers the command once for all of them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def finish(self, command: OpenSessions, opened: Sequence[OpenedRow], told: Sequence[ToldRow] = ()) -> None:
        """Answer once for all that were opened: at once, unless a tick of a generate must be waited for."""
        core, sessions, missing = self._core, self._core.sessions, len(opened)
        if not missing:
            self._tell(command, told)

        def settle(row: OpenedRow) -> None:
            nonlocal missing
            row.position = int(sessions.accepted[row.row])
            # Nothing of a state that is still to come is durable.
            awaits = core.operations and core.awaits_replacement(row.row)
            row.durable_position = 0 if awaits else int(sessions.durable_position[row.row])
            row.durability = int(sessions.durability[row.row])
            missing -= 1
            if not missing:
                self._tell(command, sorted([*opened, *told], key=lambda row: row.place))

        for row in opened:
            self._take_over(command, row)
            if row.row in core.generations:
                core.when_idle(row.row, Operation(lambda row=row: settle(row)))  # type: ignore[misc]
            else:
                settle(row)

    def _take_over(self, command: OpenSessions, opened: OpenedRow) -> None:
        """Give the session to the stream; whoever held it is refused from now on."""
        core, row, sessions = self._core, opened.row, self._core.sessions
        if not opened.created:
            core.break_off_generation(row, _MOVED)
            runs = core.model_of(row).runs
            owner = self._owner(command)
            owned = owner != NO_STREAM and int(sessions.owner[row]) == owner
            core.withdraw(
                row,
                {
                    run: _ATTACHED_AGAIN if owned and runs.request_of(run)[0] == command.stream else _MOVED
                    for run in core.waiting_runs(row)
                },
            )
            if opened.adopted:
                sessions.hand_to(row, owner)
            else:
                core.begin_epoch(row, owner, ErrorReason.ERROR_REASON_SESSION_MOVED, opened.claimed_epoch)
            sessions.last_used[row] = core.now
            if core.keeping is not None:
                core.keeping.changed(row)  # its time to expire counts anew, and a crash should know that
        holder = holder_of(command, opened.place)
        if int(sessions.holder[row]) != holder:
            sessions.holder[row] = holder
        opened.handle, opened.epoch = int(sessions.handle[row]), int(sessions.epoch[row])

    def _owner(self, command: OpenSessions) -> int:
        """The stream that is to hold the sessions. It may have ended while the store was asked."""
        is_there = self._core.keeping is None or command.stream in self._core.streams
        return command.stream if command.attach and is_there else NO_STREAM

    def create(
        self, command: OpenSessions, ids: Sequence[str] | Mapping[int, str], places: Sequence[int]
    ) -> list[OpenedRow]:
        """Create sessions; ids and places as the command has them."""
        core, served, owner = self._core, self._core.model_named(command.model), self._owner(command)
        assert served is not None
        rows = core.sessions.create([ids[place] for place in places], served.index, owner, core.now)
        opened = [OpenedRow(place, ids[place], row, True) for place, row in zip(places, rows.tolist(), strict=True)]
        if command.states is not None:
            for row in opened:
                state = command.states[row.place]
                core.sessions.position[row.row] = core.sessions.accepted[row.row] = state.position
                served.slots.replace_state(row.row, state.values)
        core.statistics.models[served.index].sessions_opened += len(rows)
        return opened

    def _tell(self, command: OpenSessions, opened: Sequence[OpenedRow | ToldRow]) -> None:
        has_store = self._core.keeping is not None
        self._core.events.append(
            Opened(
                stream=command.stream,
                requests=command.requests[np.array([row.place for row in opened])],
                session_ids=[row.session_id for row in opened],
                handles=np.array([row.handle for row in opened], np.uint64),
                positions=np.array([row.position for row in opened]),
                epochs=np.array([row.epoch for row in opened]),
                created=np.array([row.created for row in opened]),
                durable_positions=np.array([row.durable_position for row in opened]) if has_store else None,
                durabilities=np.array([row.durability for row in opened], np.uint8),
            )
        )

    def refuse(self, command: OpenSessions, ids: Sequence[str], refusals: dict[int, Refusal]) -> None:
        """Refuse rows; with all_or_none one refusal stands for all."""
        core = self._core
        for refusal in refusals.values():
            core.statistics.sessions_rejected[reason_name(refusal.reason)] += 1
        if command.all_or_none:
            place, refusal = min(refusals.items(), key=lambda item: item[0])
            core.refuse(command.stream, command.requests[:1], [_naming(refusal, place, ids)])
            return
        places = sorted(refusals)
        core.refuse(command.stream, command.requests[np.array(places)], [refusals[place] for place in places])


def _naming(refusal: Refusal, place: int, ids: Sequence[str]) -> Refusal:
    if len(ids) == 1:
        return refusal
    message = f"nothing was opened; session {place} of {len(ids)}: {refusal.message}"
    return Refusal(refusal.reason, message, refusal.position, refusal.field)
