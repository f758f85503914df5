"""Sessions as a SQLite store reads them: the facts that decide, apart from the content that few operations want.

Facts of any number of sessions come in one step, as JSON: see sqlite_writes. Times do not, for SQLite writes them into
JSON with 15 digits; what was to be asked of them is asked in SQL.
"""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores.operations import Ended, Listed, ListRows, Row

# What is forgotten, deleted or not, is as if it had never been.
_READ_FACTS = """
SELECT json_group_array(json_array(
    session_id, model, epoch, state_epoch, position, replica, holder, token, request_id, reason, expires_at <= :now))
FROM sessions WHERE session_id IN (SELECT value FROM json_each(:ids))
AND CASE WHEN reason IS NULL THEN expires_at > :gone_before ELSE forget_at > :now END
"""
_READ_CONTENTS = """
SELECT session_id, expires_at, blob, checkpoints
FROM sessions WHERE session_id IN (SELECT value FROM json_each(?)) AND reason IS NULL
"""
_OF_MODEL = "AND model = :model"
# The plus keeps SQLite from sorting all that expire later.
_LIST = """
SELECT session_id, model, state_epoch, position, holder, expires_at, request_id, blob, checkpoints, epoch
FROM sessions WHERE session_id > :after AND reason IS NULL AND +expires_at > :now {} ORDER BY session_id LIMIT :limit
"""
# Both from an index alone; left to itself, SQLite looks up each row of a model.
_COUNT = "SELECT count(*) FROM sessions INDEXED BY living_by_expiry WHERE reason IS NULL AND expires_at > :now {}"


@dataclass(slots=True)
class Facts:
    """What decides about a session. The fields' order is that of the columns in sqlite_writes."""

    model: str
    epoch: int
    state_epoch: int
    position: int
    replica: int
    holder: int
    token: int | None
    request_id: str
    reason: int | None  # why it ended
    is_expired: bool

    @property
    def is_living(self) -> bool:
        return self.reason is None and not self.is_expired

    @property
    def ended(self) -> Ended:
        if self.reason is None:
            return Ended(ErrorReason.ERROR_REASON_SESSION_EXPIRED, "", self.position)
        return Ended(self.reason, self.request_id, self.position)


@dataclass(frozen=True, slots=True)
class Content:
    """What a row holds beside its facts."""

    expires_at: float
    blob: bytes
    checkpoints: bytes | None


def read_facts(
    connection: sqlite3.Connection, session_ids: Iterable[str], *, now: float, gone_before: float
) -> dict[str, Facts]:
    """Facts by id; rows that expired at `gone_before` or earlier are forgotten."""
    parameters = {"ids": json.dumps(list(session_ids)), "now": now, "gone_before": gone_before}
    (facts,) = connection.execute(_READ_FACTS, parameters).fetchone()
    return {session_id: Facts(*columns) for session_id, *columns in json.loads(facts)}


def read_contents(connection: sqlite3.Connection, session_ids: Iterable[str]) -> dict[str, Content]:
    """Contents by id, of sessions that have not ended."""
    rows = connection.execute(_READ_CONTENTS, (json.dumps(list(session_ids)),))
    return {session_id: Content(*columns) for session_id, *columns in rows}


def list_rows(connection: sqlite3.Connection, operation: ListRows, *, now: float) -> Listed:
    """A page of the living sessions."""
    of_model = _OF_MODEL if operation.model else ""
    parameters = {"after": operation.after, "model": operation.model, "limit": operation.limit, "now": now}
    listed: list[tuple[Row, int]] = []
    for columns in connection.execute(_LIST.format(of_model), parameters):
        session_id, model, state_epoch, position, holder, expires_at, request_id, blob, checkpoints, epoch = columns
        row = Row(
            session_id=session_id,
            model=model,
            epoch=state_epoch,
            position=position,
            holder=unsigned(holder),
            expires_at=expires_at,
            request_id=request_id,
            blob=blob,
            checkpoints=checkpoints or None,
        )
        listed.append((row, epoch))
    (total,) = connection.execute(_COUNT.format(of_model), parameters).fetchone()
    return Listed(listed, total)


def signed(value: int) -> int:
    """An unsigned 64-bit number as SQLite can hold it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def unsigned(value: int) -> int:
    """The number that was made signed."""
    return value & 0xFFFF_FFFF_FFFF_FFFF
