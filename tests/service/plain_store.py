"""A state store as a dict, written from what operations.py says: what the real ones are held against."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores.operations import (
    Claim,
    ClaimAll,
    Claimed,
    ClaimMode,
    ClaimResult,
    End,
    Ended,
    Listed,
    ListRows,
    Load,
    Loaded,
    Operation,
    Outcome,
    Row,
    Save,
    Written,
)

__all__ = ["PlainStore"]

SUCCESSES = {ClaimResult.CREATED, ClaimResult.TAKEN, ClaimResult.KEPT}
CREATING = {ClaimMode.CREATE, ClaimMode.ATTACH_OR_CREATE}


@dataclass(frozen=True)
class Living:
    """A row, whose it is, and its session's epoch; `token` of the claim that made it."""

    row: Row
    replica: int
    epoch: int
    token: int | None


@dataclass(frozen=True)
class Dead:
    """What is remembered of an ended session."""

    ended: Ended
    replica: int
    epoch: int
    forget_at: float


class PlainStore:
    """One database; the replicas that use it name themselves."""

    def __init__(self, ended_memory_seconds: float) -> None:
        self._memory = ended_memory_seconds
        self._sessions: dict[str, Living | Dead] = {}
        self._replica = 0
        self._now = 0.0

    def apply(self, replica: int, operations: Sequence[Operation], *, now: float) -> list[Outcome]:
        """The outcomes of a batch of a replica."""
        self._replica, self._now = replica, now
        return [self._do(operation) for operation in operations]

    def _find(self, session_id: str) -> Living | Dead | None:
        found = self._sessions.get(session_id)
        if isinstance(found, Living):
            return None if found.row.expires_at <= self._now - self._memory else found
        return None if found is None or found.forget_at <= self._now else found

    def _ended(self, found: Living | Dead) -> Ended | None:
        if isinstance(found, Dead):
            return found.ended
        expired = Ended(ErrorReason.ERROR_REASON_SESSION_EXPIRED, "", found.row.position)
        return expired if found.row.expires_at <= self._now else None

    def _do(self, operation: Operation) -> Outcome:
        match operation:
            case Claim():
                return self._claim(operation)
            case ClaimAll(claims):
                return self._claim_all(claims)
            case Save(row):
                return self._save(row)
            case End():
                return self._end(operation)
            case Load(session_id):
                found = self._find(session_id)
                if found is None:
                    return Loaded()
                ended = self._ended(found)
                if ended is None:
                    assert isinstance(found, Living)
                    return Loaded(found.row, found.epoch)
                return Loaded(ended=ended)
            case ListRows(model, after, limit):
                living = [
                    (found.row, found.epoch)
                    for _, found in sorted(self._sessions.items())
                    if isinstance(found, Living) and found.row.expires_at > self._now and model in ("", found.row.model)
                ]
                return Listed([pair for pair in living if pair[0].session_id > after][:limit], len(living))

    def _claim_all(self, claims: Sequence[Claim]) -> list[Claimed]:
        before = dict(self._sessions)
        outcomes = [self._claim(claim) for claim in claims]
        if all(outcome.result in SUCCESSES for outcome in outcomes):
            return outcomes
        self._sessions = before
        undone = Claimed(ClaimResult.UNDONE)
        return [undone if outcome.result in SUCCESSES else outcome for outcome in outcomes]

    def _claim(self, claim: Claim) -> Claimed:
        found = self._find(claim.session_id)
        ended = None if found is None else self._ended(found)
        if found is None or ended is not None:
            if claim.created is not None and claim.mode in CREATING:
                return self._create(claim, claim.created, found)
            return Claimed(ClaimResult.MISSING if ended is None else ClaimResult.ENDED, ended=ended)
        assert isinstance(found, Living)
        is_mine, row = found.replica == self._replica, found.row
        if claim.created is not None and claim.mode in CREATING and is_mine and found.token == claim.token:
            return Claimed(ClaimResult.CREATED, found.epoch)
        if claim.mode is ClaimMode.CREATE or claim.model not in (None, row.model):
            return Claimed(ClaimResult.EXISTS, found.epoch, row)
        if claim.mode is ClaimMode.RESUME and claim.holder != row.holder:
            return Claimed(ClaimResult.MOVED, found.epoch)
        epoch = max(found.epoch + 1, claim.epoch)
        if claim.holder is not None:
            row = replace(row, holder=claim.holder)
        self._sessions[claim.session_id] = Living(row, self._replica, epoch, found.token)
        if not is_mine:
            return Claimed(ClaimResult.TAKEN, epoch, row)
        return Claimed(ClaimResult.KEPT, epoch, None if claim.is_resident else row)

    def _create(self, claim: Claim, row: Row, found: Living | Dead | None) -> Claimed:
        epoch = max(1, row.epoch, claim.epoch, 0 if found is None else found.epoch + 1)
        row = replace(row, checkpoints=row.checkpoints or None)
        if claim.holder is not None:
            row = replace(row, holder=claim.holder)
        self._sessions[claim.session_id] = Living(row, self._replica, epoch, claim.token)
        return Claimed(ClaimResult.CREATED, epoch)

    def _save(self, row: Row) -> Written:
        found = self._find(row.session_id)
        if found is None:
            row = replace(row, checkpoints=row.checkpoints or None)
            self._sessions[row.session_id] = Living(row, self._replica, row.epoch, None)
            return Written.WRITTEN
        if isinstance(found, Dead) or found.replica != self._replica:
            return Written.FENCED
        if (row.epoch, row.position) < (found.row.epoch, found.row.position):
            return Written.OLDER
        checkpoints = found.row.checkpoints if row.checkpoints is None else row.checkpoints or None
        row = replace(row, model=found.row.model, checkpoints=checkpoints)
        self._sessions[row.session_id] = Living(row, self._replica, max(found.epoch, row.epoch), found.token)
        return Written.WRITTEN

    def _end(self, end: End) -> Written:
        found = self._find(end.session_id)
        ended = Ended(end.reason, end.request_id, end.position)
        if found is not None and found.replica != self._replica:
            return Written.FENCED
        if isinstance(found, Dead):
            return Written.WRITTEN if found.ended == ended else Written.FENCED
        epoch = 0 if found is None else found.epoch
        self._sessions[end.session_id] = Dead(ended, self._replica, epoch, end.forget_at)
        return Written.WRITTEN
