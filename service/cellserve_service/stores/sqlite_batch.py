"""Does a batch of operations on the tables of a SQLite store: reads what it needs at once, decides, writes at once."""

import sqlite3
from collections.abc import Sequence

from cellserve_service.stores.operations import (
    Claim,
    ClaimAll,
    Claimed,
    ClaimMode,
    ClaimResult,
    End,
    Ended,
    ListRows,
    Load,
    Loaded,
    Operation,
    Outcome,
    Row,
    Save,
    Written,
)
from cellserve_service.stores.sqlite_reads import (
    Content,
    Facts,
    list_rows,
    read_contents,
    read_facts,
    signed,
    unsigned,
)
from cellserve_service.stores.sqlite_writes import Write, Writes

_SUCCESSES = (ClaimResult.CREATED, ClaimResult.TAKEN, ClaimResult.KEPT)


class Batch:
    """One batch, within a transaction that the caller begins and commits.

    `_facts` are the sessions after the operations done so far, those of the tables after the writes are flushed.
    """

    def __init__(
        self, connection: sqlite3.Connection, *, replica: int, now: float, ended_memory_seconds: float
    ) -> None:
        self._connection = connection
        self._replica = signed(replica)
        self._now = now
        self._gone_before = now - ended_memory_seconds
        self._writes = Writes(connection)
        self._facts: dict[str, Facts] = {}
        self._contents: dict[str, Content] = {}

    def apply(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Do the operations in order."""
        self._read(operations)
        outcomes = [self._do(operation) for operation in operations]
        self._writes.flush()
        return outcomes

    def _do(self, operation: Operation) -> Outcome:
        match operation:
            case Save(row):
                return self._save(row)
            case Claim():
                return self._claim(operation, self._judge(operation))
            case ClaimAll(claims):
                return self._claim_all(claims)
            case End():
                return self._end(operation)
            case Load(session_id):
                return self._load(session_id)
            case ListRows():
                self._writes.flush()
                return list_rows(self._connection, operation, now=self._now)

    def _read(self, operations: Sequence[Operation]) -> None:
        """Facts of all sessions that are named, and the contents that will probably be asked for."""
        claims: list[Claim] = []
        ids: set[str] = set()
        loaded: set[str] = set()
        for operation in operations:
            match operation:
                case Save(row):
                    ids.add(row.session_id)
                case Claim():
                    claims.append(operation)
                case ClaimAll():
                    claims += operation.claims
                case End(session_id):
                    ids.add(session_id)
                case Load(session_id):
                    loaded.add(session_id)
        ids |= loaded
        ids.update(claim.session_id for claim in claims)
        if ids:
            self._facts = read_facts(self._connection, ids, now=self._now, gone_before=self._gone_before)
        for claim in claims:
            facts = self._facts.get(claim.session_id)
            if facts is not None and not (claim.is_resident and facts.replica == self._replica):
                loaded.add(claim.session_id)
        loaded = {session_id for session_id in loaded & self._facts.keys() if self._facts[session_id].is_living}
        if loaded:
            self._contents = read_contents(self._connection, loaded)

    def _judge(self, claim: Claim) -> ClaimResult:
        """What a claim would come to."""
        facts = self._facts.get(claim.session_id)
        creates = claim.created is not None and claim.mode in (ClaimMode.CREATE, ClaimMode.ATTACH_OR_CREATE)
        if facts is None or not facts.is_living:
            if creates:
                return ClaimResult.CREATED
            return ClaimResult.MISSING if facts is None else ClaimResult.ENDED
        is_mine = facts.replica == self._replica
        if creates and is_mine and facts.token == claim.token:
            return ClaimResult.CREATED  # this very claim made it before
        if claim.mode is ClaimMode.CREATE or (claim.model is not None and facts.model != claim.model):
            return ClaimResult.EXISTS
        if claim.mode is ClaimMode.RESUME and (claim.holder is None or facts.holder != signed(claim.holder)):
            return ClaimResult.MOVED
        return ClaimResult.KEPT if is_mine else ClaimResult.TAKEN

    def _claim(self, claim: Claim, result: ClaimResult) -> Claimed:
        """Do what was judged."""
        facts = self._facts.get(claim.session_id)
        if result is ClaimResult.CREATED:
            return Claimed(result, self._create(claim, facts))
        if facts is None:
            return Claimed(result)
        if result is ClaimResult.ENDED:
            return Claimed(result, ended=facts.ended)
        if result is ClaimResult.MOVED:
            return Claimed(result, facts.epoch)
        if result is not ClaimResult.EXISTS:
            facts.epoch, facts.replica = max(facts.epoch + 1, claim.epoch), self._replica
            if claim.holder is not None:
                facts.holder = signed(claim.holder)
            self._writes.add(Write.TAKE, claim.session_id, facts.model, facts.epoch, self._replica, facts.holder)
            if result is ClaimResult.KEPT and claim.is_resident:
                return Claimed(result, facts.epoch)
        return Claimed(result, facts.epoch, self._row(claim.session_id))

    def _create(self, claim: Claim, facts: Facts | None) -> int:
        """The new session's epoch."""
        row = claim.created
        assert row is not None
        if facts is not None and facts.is_living:
            return facts.epoch
        epoch = max(1, row.epoch, claim.epoch, 0 if facts is None else facts.epoch + 1)
        self._put(row, epoch, row.holder if claim.holder is None else claim.holder, claim.token)
        return epoch

    def _claim_all(self, claims: Sequence[Claim]) -> list[Claimed]:
        results = [self._judge(claim) for claim in claims]
        succeeds = all(result in _SUCCESSES for result in results)
        return [
            self._claim(claim, result) if succeeds or result not in _SUCCESSES else Claimed(ClaimResult.UNDONE)
            for claim, result in zip(claims, results, strict=True)
        ]

    def _save(self, row: Row) -> Written:
        facts = self._facts.get(row.session_id)
        if facts is None:
            self._put(row, row.epoch, row.holder, None)
            return Written.WRITTEN
        if facts.replica != self._replica or facts.reason is not None:
            return Written.FENCED
        if (row.epoch, row.position) < (facts.state_epoch, facts.position):
            return Written.OLDER
        facts.epoch, facts.state_epoch, facts.position = max(facts.epoch, row.epoch), row.epoch, row.position
        facts.holder, facts.request_id = signed(row.holder), row.request_id
        self._writes.add(
            *(Write.SAVE, row.session_id, facts.model, facts.epoch, row.epoch, row.position, self._replica),
            *(facts.holder, row.request_id, row.expires_at, row.blob, row.checkpoints),
        )
        earlier = self._contents.pop(row.session_id, None)
        if row.checkpoints is not None:
            self._contents[row.session_id] = Content(row.expires_at, row.blob, row.checkpoints)
        elif earlier is not None:
            self._contents[row.session_id] = Content(row.expires_at, row.blob, earlier.checkpoints)
        self._date(row)
        return Written.WRITTEN

    def _put(self, row: Row, epoch: int, holder: int, token: int | None) -> None:
        facts = Facts(
            *(row.model, epoch, row.epoch, row.position, self._replica, signed(holder), token, row.request_id),
            reason=None,
            is_expired=False,
        )
        self._facts[row.session_id] = facts
        self._contents[row.session_id] = Content(row.expires_at, row.blob, row.checkpoints)
        self._writes.add(
            *(Write.PUT, row.session_id, facts.model, epoch, row.epoch, row.position, self._replica, facts.holder),
            *(token, row.request_id, None, row.expires_at, row.blob, row.checkpoints, None),
        )
        self._date(row)

    def _date(self, row: Row) -> None:
        """A row may be written when its time is over, and even when it is to be forgotten."""
        self._facts[row.session_id].is_expired = row.expires_at <= self._now
        if row.expires_at <= self._gone_before:
            del self._facts[row.session_id]

    def _end(self, end: End) -> Written:
        facts = self._facts.get(end.session_id)
        if facts is not None and facts.replica != self._replica:
            return Written.FENCED
        if facts is not None and facts.reason is not None:
            is_repeat = facts.ended == Ended(end.reason, end.request_id, end.position)
            return Written.WRITTEN if is_repeat else Written.FENCED
        model, epoch = ("", 0) if facts is None else (facts.model, facts.epoch)
        self._facts[end.session_id] = Facts(
            *(model, epoch, 0, end.position, self._replica, 0, None, end.request_id, end.reason), is_expired=False
        )
        if end.forget_at <= self._now:
            del self._facts[end.session_id]
        self._writes.add(
            *(Write.PUT, end.session_id, model, epoch, 0, end.position, self._replica, 0, None),
            *(end.request_id, end.reason, None, None, None, end.forget_at),
        )
        return Written.WRITTEN

    def _load(self, session_id: str) -> Loaded:
        facts = self._facts.get(session_id)
        if facts is None:
            return Loaded()
        if not facts.is_living:
            return Loaded(ended=facts.ended)
        return Loaded(self._row(session_id), facts.epoch)

    def _row(self, session_id: str) -> Row:
        facts, content = self._facts[session_id], self._contents.get(session_id)
        if content is None:  # a rare one that was not foreseen
            self._writes.flush()
            content = read_contents(self._connection, [session_id])[session_id]
        return Row(
            session_id=session_id,
            model=facts.model,
            epoch=facts.state_epoch,
            position=facts.position,
            holder=unsigned(facts.holder),
            expires_at=content.expires_at,
            request_id=facts.request_id,
            blob=content.blob,
            checkpoints=content.checkpoints or None,
        )
