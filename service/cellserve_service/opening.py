"""Opens sessions: creates them, or attaches the ones that exist and takes them over from whoever held them."""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability as ContractDurability
from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.adoption import adopt, ended_refusal, first_answer
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal, invalid, reason_name
from cellserve_service.keeping import MOVED
from cellserve_service.messages import InitialState, Opened, OpenSessions
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_STREAM, Durability
from cellserve_service.snapshots import new_session
from cellserve_service.stepping import ModelInfo
from cellserve_service.stores.operations import Claim, ClaimAll, Claimed, ClaimMode, ClaimResult, Outcome, Row
from cellserve_service.stores.rows import LastRequest, StoredSession, encode_session

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MODES = frozenset(OpenMode.values())
_DURABILITIES = frozenset(ContractDurability.values())
# Modes in which nothing is created.
_EXISTING = frozenset((OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_RESUME))
_CLAIM_MODES = {
    OpenMode.OPEN_MODE_UNSPECIFIED: ClaimMode.ATTACH_OR_CREATE,
    OpenMode.OPEN_MODE_ATTACH: ClaimMode.ATTACH,
    OpenMode.OPEN_MODE_CREATE: ClaimMode.CREATE,
    OpenMode.OPEN_MODE_ATTACH_OR_CREATE: ClaimMode.ATTACH_OR_CREATE,
    OpenMode.OPEN_MODE_RESUME: ClaimMode.RESUME,
}

_MOVED = Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, "the session was taken over")
_ATTACHED_AGAIN = Refusal(ErrorReason.ERROR_REASON_STALE_HANDLE, "the session was attached again on this stream")


def made_id(request_id: str, place: int | str) -> str:
    """The id of a session that comes without one; a repeat of the call means the same session.

    place: tells the sessions of one call from each other.
    """
    if not request_id:
        return secrets.token_hex(12)
    return hashlib.sha256(f"{place} {request_id}".encode()).hexdigest()[:24]


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
    claimed_epoch: int = 0  # by the store; 0: the session is not durable
    adopted: bool = False  # it came from the store, in its new epoch
    handle: int = 0
    epoch: int = 0
    position: int = 0
    durable_position: int = 0
    durability: int = Durability.NONE


@dataclass(frozen=True, slots=True)
class _Told:
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


class Opening:
    """Opens sessions of one command after the other."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._served_by_name = {served.info.name: served for served in core.served}
        self._num_coming = 0  # sessions of which the store has been asked

    def open(self, command: OpenSessions) -> None:
        """Open every row that can be opened; with `all_or_none`, all rows or none."""
        ids = command.session_ids
        if ids is None:
            ids = [made_id(command.request_id, place) for place in range(len(command.requests))]
        ending = next((session_id for session_id in ids if session_id in self._core.closing), None)
        if ending is not None:
            self._core.closing[ending].append(lambda: self.open(command))
            return
        refusals = self._check(command, ids)
        if refusals:
            self._refuse(command, ids, refusals)
            if command.all_or_none:
                return
        places = [place for place in range(len(ids)) if place not in refusals]
        claims = [place for place in places if self._needs_claim(command, ids[place])]
        if claims and command.all_or_none:
            self._claim(command, ids, places)
            return
        if claims:
            self._claim(command, ids, claims)
        claimed = set(claims)
        here = [place for place in places if place not in claimed]
        if here:
            self._open(command, ids, here)

    def _open(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int]) -> None:
        """Open sessions that concern no state store."""
        row_by_id = self._core.sessions.row_by_id
        new = [place for place in places if ids[place] not in row_by_id]
        opened = [_Row(place, ids[place], row_by_id[ids[place]], False) for place in places if ids[place] in row_by_id]
        self._finish(command, [*opened, *self._create(command, ids, new)])

    def _finish(self, command: OpenSessions, opened: Sequence[_Row], told: Sequence[_Told] = ()) -> None:
        """Answer once for all that were opened: at once, unless a tick of a generate must be waited for."""
        core, sessions, missing = self._core, self._core.sessions, len(opened)
        if not missing:
            self._tell(command, told)

        def settle(row: _Row) -> None:
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

    # With a state store: what is to be durable, and what may be stored, is claimed there before it is opened here.

    def _needs_claim(self, command: OpenSessions, session_id: str) -> bool:
        core = self._core
        if core.keeping is None:
            return False
        row = core.sessions.row_by_id.get(session_id)
        if row is not None:
            return bool(core.sessions.durability[row] != Durability.NONE)
        return command.session_ids is not None or self._durability(command) != Durability.NONE

    def _is_durable(self, session_id: str) -> bool:
        """Whether it is a durable session that is here."""
        row = self._core.sessions.row_by_id.get(session_id)
        return row is not None and bool(self._core.sessions.durability[row] != Durability.NONE)

    def _durability(self, command: OpenSessions) -> int:
        """What sessions that the command creates get."""
        if command.durability != ContractDurability.DURABILITY_UNSPECIFIED:
            return command.durability
        return Durability.NONE if self._core.keeping is None else Durability.PERIODIC

    def _claim(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int], *, looked: bool = False) -> None:
        core, keeping = self._core, self._core.keeping
        assert keeping is not None
        # Before a session is taken over it is looked for whether this is the repeat of the call that made it.
        looks = not looked and bool(command.request_id) and _CLAIM_MODES[command.mode] is ClaimMode.ATTACH_OR_CREATE
        claims = [self._make_claim(command, ids[place], place, looks=looks) for place in places]
        num_new = sum(ids[place] not in core.sessions.row_by_id for place in places)
        self._num_coming += num_new
        keeping.begin_claims(ids[place] for place in places)

        def come() -> None:
            self._num_coming -= num_new
            keeping.end_claims(ids[place] for place in places)

        def done(outcomes: Sequence[Outcome]) -> None:
            claimed = outcomes[0] if command.all_or_none else outcomes
            assert isinstance(claimed, Sequence)
            one_each = [outcome for outcome in claimed if isinstance(outcome, Claimed)]
            exist = [one for one in one_each if one.result is ClaimResult.EXISTS]
            if looks and exist and not all(first_answer(one.row, command.request_id) for one in one_each):
                self._claim(command, ids, places, looked=True)
            else:
                self._take_claimed(command, ids, places, one_each)
            come()

        def failed(refusal: Refusal) -> None:
            come()
            if self._durability(command) != Durability.NONE or command.mode in _EXISTING:
                self._refuse(command, ids, dict.fromkeys(places, refusal))
                return
            # A server without its store still serves sessions that need none.
            refused = {place: refusal for place in places if self._is_durable(ids[place])}
            if refused:
                self._refuse(command, ids, refused)
            if not refused or not command.all_or_none:
                others = [place for place in places if place not in refused]
                self._take_claimed(command, ids, others, [Claimed(ClaimResult.MISSING)] * len(others))

        keeping.ask([ClaimAll(claims)] if command.all_or_none else claims, done, failed)

    def _make_claim(self, command: OpenSessions, session_id: str, place: int, *, looks: bool) -> Claim:
        core, served = self._core, self._served_by_name[command.model]
        row = core.sessions.row_by_id.get(session_id)
        mode = _CLAIM_MODES[command.mode]
        if looks or command.states is not None or command.session_ids is None:
            mode = ClaimMode.CREATE
        created, holder = None, self._holder(command, place)
        if row is None and mode not in (ClaimMode.ATTACH, ClaimMode.RESUME):
            durability = self._durability(command)
            if durability != Durability.NONE:
                state = None if command.states is None else command.states[place]
                session = new_session(
                    served,
                    durability=durability,
                    created_at=core.now + core.wall_offset,
                    request_id=command.request_id,
                    position=0 if state is None else state.position,
                    values=None if state is None else state.values,
                )
                idle = core.limits.idle_timeout_seconds
                created = created_row(session_id, command.model, session, idle, holder=holder)
        return Claim(
            session_id,
            command.model,
            mode,
            # A session without a mark is not resumed by asking for none.
            holder=None if mode is ClaimMode.RESUME and not holder else holder,
            epoch=0 if row is None else int(core.sessions.epoch[row]) + 1,
            is_resident=row is not None,
            created=created,
        )

    def _holder(self, command: OpenSessions, place: int) -> int:
        return 0 if command.holders is None else int(command.holders[place])

    def _take_claimed(
        self, command: OpenSessions, ids: Sequence[str], places: Sequence[int], outcomes: Sequence[Claimed]
    ) -> None:
        opened: list[_Row] = []
        refusals: dict[int, Refusal] = {}
        told: list[_Told] = []
        again: list[int] = []  # sessions that have left this server since they were claimed for it
        for place, claimed in zip(places, outcomes, strict=True):
            if claimed.result is ClaimResult.UNDONE:
                continue
            match self._take_one(command, ids[place], place, claimed):
                case Refusal() as refusal:
                    refusals[place] = refusal
                case _Told() as one:
                    told.append(one)
                case _Row() as row:
                    opened.append(row)
                case None:
                    again.append(place)
        if command.all_or_none and (again or (told and len(told) + len(opened) < len(ids))):
            refusals |= {place: _just_left(ids[place]) for place in again}
            # Others of that call have ended since.
            refusals |= {one.place: _exists(f"session {one.session_id!r} exists") for one in told}
        if refusals:
            self._refuse(command, ids, refusals)
            if command.all_or_none:
                return
        if told or opened:
            self._finish(command, opened, told)
        if again:
            self._claim(command, ids, again)

    def _take_one(
        self, command: OpenSessions, session_id: str, place: int, claimed: Claimed
    ) -> _Row | _Told | Refusal | None:
        """One session as the store's answer makes it; _finish gives it to its stream. None: claim it again."""
        core, sessions = self._core, self._core.sessions
        row = sessions.row_by_id.get(session_id)
        keeping = core.keeping
        assert keeping is not None
        match claimed.result:
            case ClaimResult.CREATED:
                if row is not None:
                    # What was here of this id has ended elsewhere.
                    keeping.lose(row, MOVED)
                if not sessions.num_free:
                    return session_limit(core)
                [created] = self._create(command, {place: session_id}, [place])
                sessions.durability[created.row] = self._durability(command)
                sessions.durable_position[created.row] = sessions.position[created.row]
                sessions.epoch[created.row] = claimed.epoch
                if command.request_id:
                    last = LastRequest(command.request_id, claimed.epoch, int(sessions.position[created.row]))
                    sessions.last_request[created.row] = last
                return created
            case ClaimResult.TAKEN | ClaimResult.KEPT:
                if row is not None and claimed.result is ClaimResult.KEPT:
                    resumes = command.mode == OpenMode.OPEN_MODE_RESUME
                    if resumes and self._holder(command, place) != int(sessions.holder[row]):
                        return _resumed_by_another(session_id)
                    return _Row(place, session_id, row, False, claimed.epoch)
                if row is not None:
                    keeping.lose(row, MOVED)
                if claimed.row is None:
                    return None
                if not sessions.num_free:
                    return session_limit(core)
                adopted = adopt(core, claimed.row, claimed.epoch)
                if isinstance(adopted, Refusal):
                    return adopted
                return _Row(place, session_id, adopted, False, claimed.epoch, adopted=True)
            case ClaimResult.EXISTS:
                first, stored = first_answer(claimed.row, command.request_id), claimed.row
                if first is not None:
                    return _Told(place, session_id, first.epoch, first.position, self._durability(command))
                whose = "" if stored is None or stored.model == command.model else f" with model {stored.model!r}"
                return _exists(f"session {session_id!r} exists{whose}")
            case ClaimResult.MOVED:
                return _resumed_by_another(session_id)
        return self._take_missing(command, session_id, place, claimed, row)

    def _take_missing(
        self, command: OpenSessions, session_id: str, place: int, claimed: Claimed, row: int | None
    ) -> _Row | Refusal | None:
        """The store has no such session."""
        core = self._core
        ended = claimed.ended
        if row is not None:
            assert core.keeping is not None
            gone = None if ended is None else ended_refusal(session_id, ended)
            if core.sessions.is_in_store[row]:  # nothing is left of it
                gone = gone or Refusal(ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, f"session {session_id!r} is lost")
            elif ended is not None and ended.reason == ErrorReason.ERROR_REASON_SESSION_EXPIRED:
                gone = None
            if gone is not None:
                core.keeping.lose(row, gone)
                return None
            # What has come here since the store was asked is not as it was then.
            refusal = self._check_one(command, self._served_by_name[command.model], place, session_id, set())
            if refusal is not None:
                return refusal
            # It is here alone: the store lost it, or thought it idle. The next checkpoint mends that.
            core.keeping.changed(row)
            return _Row(place, session_id, row, False)
        if command.mode in _EXISTING:
            missing = core.sessions.resolve_id(session_id) if ended is None else ended_refusal(session_id, ended)
            assert isinstance(missing, Refusal)
            return missing
        if not core.sessions.num_free:
            return session_limit(core)
        return self._create(command, {place: session_id}, [place])[0]

    def _refuse(self, command: OpenSessions, ids: Sequence[str], refusals: dict[int, Refusal]) -> None:
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

    def _take_over(self, command: OpenSessions, opened: _Row) -> None:
        """Give the session to the stream; whoever held it is refused from now on."""
        core, row, sessions = self._core, opened.row, self._core.sessions
        if not opened.created:
            core.break_off_generation(row, _MOVED)
            streams = core.model_of(row).runs.stream
            owner = self._owner(command)
            owned = owner != NO_STREAM and int(sessions.owner[row]) == owner
            core.withdraw(
                row,
                {
                    run: _ATTACHED_AGAIN if owned and streams[run] == command.stream else _MOVED
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
        sessions.holder[row] = self._holder(command, opened.place)
        opened.handle, opened.epoch = int(sessions.handle[row]), int(sessions.epoch[row])

    def _owner(self, command: OpenSessions) -> int:
        """The stream that is to hold the sessions. It may have ended while the store was asked."""
        is_there = self._core.keeping is None or command.stream in self._core.streams
        return command.stream if command.attach and is_there else NO_STREAM

    def _create(
        self, command: OpenSessions, ids: Sequence[str] | Mapping[int, str], places: Sequence[int]
    ) -> list[_Row]:
        core, served, owner = self._core, self._served_by_name[command.model], self._owner(command)
        rows = core.sessions.create([ids[place] for place in places], served.index, owner, core.now)
        opened = [_Row(place, ids[place], row, True) for place, row in zip(places, rows.tolist(), strict=True)]
        if command.states is not None:
            for row in opened:
                state = command.states[row.place]
                core.sessions.position[row.row] = core.sessions.accepted[row.row] = state.position
                served.slots.replace_state(row.row, state.values)
        core.statistics.models[served.index].sessions_opened += len(rows)
        return opened

    def _tell(self, command: OpenSessions, opened: Sequence[_Row | _Told]) -> None:
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
        room = core.sessions.num_free - self._num_coming
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
        if command.mode == OpenMode.OPEN_MODE_RESUME and not command.attach:
            return invalid("a session is resumed on a stream", "mode")
        if command.mode == OpenMode.OPEN_MODE_RESUME and command.holders is None:
            return invalid("resuming needs the marks of the holders", "holders")
        durable = command.durability in (Durability.PERIODIC, Durability.SYNC)
        if durable and self._core.keeping is None:
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
            is_known_here = core.keeping is None and command.mode in _EXISTING
            missing = core.sessions.resolve_id(session_id) if is_known_here else None
            return missing if isinstance(missing, Refusal) else None
        if command.mode == OpenMode.OPEN_MODE_RESUME and not self._is_durable(session_id):
            mark = self._holder(command, place)
            if not mark or mark != int(core.sessions.holder[row]):
                return _resumed_by_another(session_id)
        last = core.sessions.last_request.get(row)
        if last is not None and last.request_id and last.request_id == command.request_id:
            return None  # a repeat, which is answered as the first call was
        exists = None
        if command.mode == OpenMode.OPEN_MODE_CREATE:
            exists = f"session {session_id!r} exists"
        elif command.states is not None:
            exists = f"session {session_id!r} exists; a state can only begin a new one"
        elif core.model_of(row) is not served:
            exists = f"session {session_id!r} exists with model {core.model_of(row).info.name!r}"
        if exists is not None:
            return _exists(exists)
        return None


def created_row(
    session_id: str, model: str, session: StoredSession, idle_timeout_seconds: float, *, holder: int = 0
) -> Row:
    """The row of a session that is about to be created."""
    return Row(
        session_id=session_id,
        model=model,
        epoch=session.epoch,
        position=session.position,
        holder=holder,
        expires_at=session.created_at + idle_timeout_seconds,
        request_id=session.last_request.request_id,
        blob=encode_session(session_id, session),
    )


def _exists(message: str) -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_SESSION_EXISTS, message, field="session_ids")


def _just_left(session_id: str) -> Refusal:
    message = f"session {session_id!r} has just left this server; try again"
    return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, message, field="session_ids")


def _resumed_by_another(session_id: str) -> Refusal:
    message = f"session {session_id!r} has another holder by now"
    return Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, message, field="holders")


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
