"""Opens sessions: creates them, or attaches the ones that exist.

With a state store, what is to be durable, and what may be stored, is claimed there before it is opened here.
"""

from collections.abc import Iterable, Sequence

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability as ContractDurability
from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.adoption import adopt, ended_refusal, first_answer
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.messages import OpenSessions
from cellserve_service.new_sessions import exists, first_row, made_id, session_limit
from cellserve_service.open_checks import EXISTING, check, check_one, holder_of, resumed_by_another
from cellserve_service.room import Room
from cellserve_service.sessions import Durability
from cellserve_service.store_requests import MOVED
from cellserve_service.stores.operations import Claim, ClaimAll, Claimed, ClaimMode, ClaimResult, Outcome
from cellserve_service.stores.rows import LastRequest
from cellserve_service.taking_over import OpenedRow, TakingOver, ToldRow

_CLAIM_MODES = {
    OpenMode.OPEN_MODE_UNSPECIFIED: ClaimMode.ATTACH_OR_CREATE,
    OpenMode.OPEN_MODE_ATTACH: ClaimMode.ATTACH,
    OpenMode.OPEN_MODE_CREATE: ClaimMode.CREATE,
    OpenMode.OPEN_MODE_ATTACH_OR_CREATE: ClaimMode.ATTACH_OR_CREATE,
    OpenMode.OPEN_MODE_RESUME: ClaimMode.RESUME,
}


class Opening:
    """Opens sessions of one command after the other."""

    def __init__(self, core: Core, room: Room) -> None:
        self._core = core
        self._room = room
        self._taking_over = TakingOver(core)
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
        wanted = self._num_coming + len(self._new(ids))
        refusals = check(self._core, command, ids, self._room.left(wanted, ids) - self._num_coming)
        if refusals:
            self._taking_over.refuse(command, ids, refusals)
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

    def _new(self, session_ids: Iterable[str]) -> list[str]:
        """Those that are not here."""
        row_by_id = self._core.sessions.row_by_id
        return [session_id for session_id in session_ids if session_id not in row_by_id]

    def _open(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int]) -> None:
        """Open sessions that concern no state store."""
        row_by_id = self._core.sessions.row_by_id
        new = [place for place in places if ids[place] not in row_by_id]
        self._room.make(len(new), ids)
        opened = [
            OpenedRow(place, ids[place], row_by_id[ids[place]], False) for place in places if ids[place] in row_by_id
        ]
        self._taking_over.finish(command, [*opened, *self._taking_over.create(command, ids, new)])

    def _needs_claim(self, command: OpenSessions, session_id: str) -> bool:
        core = self._core
        if core.keeping is None:
            return False
        row = core.sessions.row_by_id.get(session_id)
        if row is not None:
            return core.sessions.is_durable(row)
        return command.session_ids is not None or self._durability(command) != Durability.NONE

    def _is_durable(self, session_id: str) -> bool:
        """Whether it is a durable session that is here."""
        row = self._core.sessions.row_by_id.get(session_id)
        return row is not None and self._core.sessions.is_durable(row)

    def _durability(self, command: OpenSessions) -> int:
        """What sessions that the command creates get."""
        if command.durability != ContractDurability.DURABILITY_UNSPECIFIED:
            return command.durability
        return Durability.NONE if self._core.keeping is None else Durability.PERIODIC

    def _claim(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int], *, looked: bool = False) -> None:
        keeping = self._core.keeping
        assert keeping is not None
        # Before a session is taken over it is looked for whether this is the repeat of the call that made it.
        looks = not looked and bool(command.request_id) and _CLAIM_MODES[command.mode] is ClaimMode.ATTACH_OR_CREATE
        claims = [self._make_claim(command, ids[place], place, looks=looks) for place in places]
        num_new = len(self._new([ids[place] for place in places]))
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
            self._go_without(command, ids, places, refusal)
            come()

        keeping.ask([ClaimAll(claims)] if command.all_or_none else claims, done, failed)

    def _go_without(self, command: OpenSessions, ids: Sequence[str], places: Sequence[int], refusal: Refusal) -> None:
        """The store does not answer. A server without its store still serves sessions that need none."""
        if self._durability(command) != Durability.NONE or command.mode in EXISTING:
            self._taking_over.refuse(command, ids, dict.fromkeys(places, refusal))
            return
        refused = {place: refusal for place in places if self._is_durable(ids[place])}
        if refused:
            self._taking_over.refuse(command, ids, refused)
        if not refused or not command.all_or_none:
            others = [place for place in places if place not in refused]
            self._take_claimed(command, ids, others, [Claimed(ClaimResult.MISSING)] * len(others))

    def _make_claim(self, command: OpenSessions, session_id: str, place: int, *, looks: bool) -> Claim:
        core, served = self._core, self._core.model_named(command.model)
        assert served is not None
        row = core.sessions.row_by_id.get(session_id)
        mode = _CLAIM_MODES[command.mode]
        if looks or command.states is not None or command.session_ids is None:
            mode = ClaimMode.CREATE
        created, holder = None, holder_of(command, place)
        if row is None and mode not in (ClaimMode.ATTACH, ClaimMode.RESUME):
            durability = self._durability(command)
            if durability != Durability.NONE:
                state = None if command.states is None else command.states[place]
                created = first_row(
                    core,
                    served,
                    session_id,
                    durability=durability,
                    request_id=command.request_id,
                    holder=holder,
                    state=state,
                )
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

    def _take_claimed(
        self, command: OpenSessions, ids: Sequence[str], places: Sequence[int], outcomes: Sequence[Claimed]
    ) -> None:
        opened: list[OpenedRow] = []
        refusals: dict[int, Refusal] = {}
        told: list[ToldRow] = []
        again: list[int] = []  # sessions that have left this server since they were claimed for it
        for place, claimed in zip(places, outcomes, strict=True):
            if claimed.result is ClaimResult.UNDONE:
                continue
            match self._take_one(command, ids[place], place, claimed):
                case Refusal() as refusal:
                    refusals[place] = refusal
                case ToldRow() as one:
                    told.append(one)
                case OpenedRow() as row:
                    opened.append(row)
                case None:
                    again.append(place)
        if command.all_or_none and (again or (told and len(told) + len(opened) < len(ids))):
            refusals |= {place: _just_left(ids[place]) for place in again}
            # Others of that call have ended since.
            refusals |= {one.place: exists(f"session {one.session_id!r} exists") for one in told}
        if refusals:
            self._taking_over.refuse(command, ids, refusals)
            if command.all_or_none:
                return
        if told or opened:
            self._taking_over.finish(command, opened, told)
        if again:
            self._claim(command, ids, again)

    def _take_one(
        self, command: OpenSessions, session_id: str, place: int, claimed: Claimed
    ) -> OpenedRow | ToldRow | Refusal | None:
        """One session as the store's answer makes it; _finish gives it to its stream. None: claim it again."""
        core, sessions = self._core, self._core.sessions
        row = sessions.row_by_id.get(session_id)
        keeping = core.keeping
        assert keeping is not None
        if row is None and session_id in keeping.ending:
            return None
        match claimed.result:
            case ClaimResult.CREATED:
                if row is not None:
                    # What was here of this id has ended elsewhere.
                    keeping.lose(row, MOVED)
                if not self._room.make(1):
                    return session_limit(core)
                [created] = self._taking_over.create(command, {place: session_id}, [place])
                sessions.keep(created.row, self._durability(command))
                sessions.epoch[created.row] = claimed.epoch
                if command.request_id:
                    last = LastRequest(command.request_id, claimed.epoch, int(sessions.position[created.row]))
                    sessions.last_request[created.row] = last
                return created
            case ClaimResult.TAKEN | ClaimResult.KEPT:
                if row is not None and claimed.result is ClaimResult.KEPT:
                    resumes = command.mode == OpenMode.OPEN_MODE_RESUME
                    if resumes and holder_of(command, place) != int(sessions.holder[row]):
                        return resumed_by_another(session_id)
                    return OpenedRow(place, session_id, row, False, claimed.epoch)
                if row is not None:
                    keeping.lose(row, MOVED)
                if claimed.row is None:
                    return None
                if not self._room.make(1):
                    return session_limit(core)
                adopted = adopt(core, claimed.row, claimed.epoch)
                if isinstance(adopted, Refusal):
                    return adopted
                return OpenedRow(place, session_id, adopted, False, claimed.epoch, adopted=True)
            case ClaimResult.EXISTS:
                first, stored = first_answer(claimed.row, command.request_id), claimed.row
                if first is not None:
                    return ToldRow(place, session_id, first.epoch, first.position, self._durability(command))
                whose = "" if stored is None or stored.model == command.model else f" with model {stored.model!r}"
                return exists(f"session {session_id!r} exists{whose}")
            case ClaimResult.MOVED:
                return resumed_by_another(session_id)
        return self._take_missing(command, session_id, place, claimed, row)

    def _take_missing(
        self, command: OpenSessions, session_id: str, place: int, claimed: Claimed, row: int | None
    ) -> OpenedRow | Refusal | None:
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
            served = core.model_named(command.model)
            assert served is not None
            refusal = check_one(core, command, served, place, session_id, set())
            if refusal is not None:
                return refusal
            # It is here alone: the store lost it, or thought it idle. The next checkpoint mends that.
            core.keeping.changed(row)
            return OpenedRow(place, session_id, row, False)
        if command.mode in EXISTING:
            missing = core.sessions.resolve_id(session_id) if ended is None else ended_refusal(session_id, ended)
            assert isinstance(missing, Refusal)
            return missing
        if self._durability(command) != Durability.NONE:
            return None  # it was here when the store was asked, which so was given nothing to create
        if not self._room.make(1):
            return session_limit(core)
        return self._taking_over.create(command, {place: session_id}, [place])[0]


def _just_left(session_id: str) -> Refusal:
    message = f"session {session_id!r} has just left this server; try again"
    return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, message, field="session_ids")
