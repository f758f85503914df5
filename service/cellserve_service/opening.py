"""Opens sessions: creates them, or attaches the ones that exist and takes them over from whoever held them."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, invalid, reason_name
from cellserve_service.messages import InitialState, Opened, OpenSessions
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_STREAM
from cellserve_service.stepping import ModelInfo

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MODES = frozenset(OpenMode.values())
_DURABILITIES = frozenset(Durability.values())

_MOVED = Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, "the session was taken over")
_ATTACHED_AGAIN = Refusal(ErrorReason.ERROR_REASON_STALE_HANDLE, "the session was attached again on this stream")


def new_session_id() -> str:
    return secrets.token_hex(12)


def check_session_id(session_id: str) -> Refusal | None:
    if _SESSION_ID.fullmatch(session_id):
        return None
    shown = session_id if len(session_id) <= 128 else session_id[:125] + "..."
    return invalid(
        f"{shown!r} is no session id: 1 to 128 characters out of A-Z, a-z, 0-9, '.', '_', ':', '-'",
        "session_ids",
    )


def check_state(model: ModelInfo, state: InitialState) -> Refusal | None:
    """Why a state cannot be taken by a model, if it cannot."""
    shape = (model.num_layers, model.state_size)
    if state.fingerprint != model.fingerprint:
        message = f"the state is of another model than {model.name} version {model.version}"
    elif state.values.shape != shape:
        message = f"the state has shape {state.values.shape}; model {model.name} has {shape}"
    elif not np.isfinite(state.values).all():
        message = "the state has values that are not finite"
    else:
        return None
    return Refusal(ErrorReason.ERROR_REASON_STATE_MISMATCH, message, field="states")


@dataclass(slots=True)
class _Row:
    """A session that is opened, as it stands then."""

    place: int
    session_id: str
    row: int
    created: bool
    handle: int = 0
    epoch: int = 0
    position: int = 0


class Opening:
    """Opens sessions of one command after the other."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._served_by_name = {served.info.name: served for served in core.served}

    def open(self, command: OpenSessions) -> None:
        """Open every row that can be opened; with `all_or_none`, all rows or none."""
        core = self._core
        ids = command.session_ids
        if ids is None:
            ids = [new_session_id() for _ in command.requests]
        refusals = self._check(command, ids)
        for refusal in refusals.values():
            core.statistics.sessions_rejected[reason_name(refusal.reason)] += 1
        if refusals and command.all_or_none:
            place, refusal = min(refusals.items())
            core.refuse(command.stream, command.requests[:1], [_naming(refusal, place, ids)])
            return
        if refusals:
            places = sorted(refusals)
            requests = command.requests[np.array(places)]
            core.refuse(command.stream, requests, [refusals[place] for place in places])
        places = [place for place in range(len(ids)) if place not in refusals]
        if places:
            self._open(command, ids, places)

    def _open(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int]) -> None:
        """Answer once for all places: at once, unless a tick of a generate must be waited for."""
        row_by_id = self._core.sessions.row_by_id
        new = [place for place in places if ids[place] not in row_by_id]
        opened = [_Row(place, ids[place], row_by_id[ids[place]], False) for place in places if ids[place] in row_by_id]
        opened += self._create(command, ids, new)
        missing = len(opened)

        def settle(row: _Row) -> None:
            nonlocal missing
            row.position = int(self._core.sessions.accepted[row.row])
            missing -= 1
            if not missing:
                self._tell(command, sorted(opened, key=lambda row: row.place))

        for row in opened:
            self._take_over(command, row)
            if row.row in self._core.generations:
                self._core.when_idle(row.row, Operation(lambda row=row: settle(row)))  # type: ignore[misc]
            else:
                settle(row)

    def _take_over(self, command: OpenSessions, opened: _Row) -> None:
        """Give the session to the stream; whoever held it is refused from now on."""
        core, row, sessions = self._core, opened.row, self._core.sessions
        if not opened.created:
            core.break_off_generation(row, _MOVED)
            streams = core.model_of(row).runs.stream
            owned = command.attach and int(sessions.owner[row]) == command.stream
            core.withdraw(
                row,
                {
                    run: _ATTACHED_AGAIN if owned and streams[run] == command.stream else _MOVED
                    for run in core.waiting_runs(row)
                },
            )
            new_owner = command.stream if command.attach else NO_STREAM
            core.begin_epoch(row, new_owner, ErrorReason.ERROR_REASON_SESSION_MOVED)
            sessions.last_used[row] = core.now
        opened.handle, opened.epoch = int(sessions.handle[row]), int(sessions.epoch[row])

    def _create(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int]) -> list[_Row]:
        core, served = self._core, self._served_by_name[command.model]
        owner = command.stream if command.attach else NO_STREAM
        rows = core.sessions.create([ids[place] for place in places], served.index, owner, core.now)
        opened = [_Row(place, ids[place], row, True) for place, row in zip(places, rows.tolist(), strict=True)]
        if command.states is not None:
            for row in opened:
                state = command.states[row.place]
                core.sessions.position[row.row] = core.sessions.accepted[row.row] = state.position
                served.slots.replace_state(row.row, state.values)
        core.statistics.models[served.index].sessions_opened += len(rows)
        return opened

    def _tell(self, command: OpenSessions, opened: Sequence[_Row]) -> None:
        self._core.events.append(
            Opened(
                stream=command.stream,
                requests=command.requests[np.array([row.place for row in opened])],
                session_ids=[row.session_id for row in opened],
                handles=np.array([row.handle for row in opened], np.uint64),
                positions=np.array([row.position for row in opened]),
                epochs=np.array([row.epoch for row in opened]),
                created=np.array([row.created for row in opened]),
            )
        )

    def _check(self, command: OpenSessions, ids: Sequence[str]) -> dict[int, Refusal]:
        """Refusals by place."""
        core = self._core
        served = self._served_by_name.get(command.model)
        everywhere = self._check_command(command, served)
        if everywhere is not None or served is None:
            assert everywhere is not None
            return dict.fromkeys(range(len(ids)), everywhere)
        refusals: dict[int, Refusal] = {}
        seen: set[str] = set()
        room = core.sessions.num_free
        for place, session_id in enumerate(ids):
            refusal = self._check_one(command, served, place, session_id, seen)
            seen.add(session_id)
            if refusal is None and session_id not in core.sessions.row_by_id:
                room -= 1
                if room < 0:
                    refusal = session_limit(core)
            if refusal is not None:
                refusals[place] = refusal
        return refusals

    def _check_command(self, command: OpenSessions, served: ServedModel | None) -> Refusal | None:
        """Why no row can be opened, if none can."""
        if served is None:
            names = ", ".join(sorted(self._served_by_name)) or "none"
            message = f"no model {command.model!r} is served here; served: {names}"
            return Refusal(ErrorReason.ERROR_REASON_MODEL_NOT_FOUND, message, field="model")
        if command.mode not in _MODES:
            return invalid(f"mode {command.mode} is not known here", "mode")
        if command.durability not in _DURABILITIES:
            return invalid(f"durability {command.durability} is not known here", "durability")
        if self._core.is_draining:
            return no_more_sessions()
        if command.durability in (Durability.DURABILITY_PERIODIC, Durability.DURABILITY_SYNC):
            message = "this server has no state store to keep sessions in"
            return Refusal(ErrorReason.ERROR_REASON_NO_STORE, message, field="durability")
        return None

    def _check_one(
        self, command: OpenSessions, served: ServedModel, place: int, session_id: str, seen: set[str]
    ) -> Refusal | None:
        core = self._core
        malformed = check_session_id(session_id)
        if malformed is not None:
            return malformed
        if session_id in seen:
            return invalid(f"session {session_id!r} stands twice in one command", "session_ids")
        if command.states is not None:
            mismatch = check_state(served.info, command.states[place])
            if mismatch is not None:
                return mismatch
        row = core.sessions.row_by_id.get(session_id)
        if row is None:
            missing = core.sessions.resolve_id(session_id) if command.mode == OpenMode.OPEN_MODE_ATTACH else None
            return missing if isinstance(missing, Refusal) else None
        exists = None
        if command.mode == OpenMode.OPEN_MODE_CREATE:
            exists = f"session {session_id!r} exists"
        elif command.states is not None:
            exists = f"session {session_id!r} exists; a state can only begin a new one"
        elif core.model_of(row) is not served:
            exists = f"session {session_id!r} exists with model {core.model_of(row).info.name!r}"
        if exists is not None:
            return Refusal(ErrorReason.ERROR_REASON_SESSION_EXISTS, exists, field="session_ids")
        return None


def no_more_sessions() -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is draining and opens no sessions")


def session_limit(core: Core) -> Refusal:
    message = f"max_sessions {core.limits.max_sessions} sessions are open"
    return Refusal(ErrorReason.ERROR_REASON_SESSION_LIMIT, message)


def _naming(refusal: Refusal, place: int, ids: Sequence[str]) -> Refusal:
    if len(ids) == 1:
        return refusal
    message = f"nothing was opened; session {place} of {len(ids)}: {refusal.message}"
    return Refusal(refusal.reason, message, refusal.position, refusal.field)
