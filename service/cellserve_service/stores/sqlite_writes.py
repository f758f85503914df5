"""The tables of a SQLite store, and statements that write many rows in one step.

sqlite3 lets go of the interpreter lock at each step of a statement. While the event loop computes, it gets the lock
back only after `sys.getswitchinterval()`, 5 ms: with a statement for each row, a batch of hundreds would take seconds.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

SCHEMA_VERSION = 1

# Only what a save leaves as it is stands in an index, but for expires_at, which counting needs beside expiry.
SCHEMA = (
    """
    CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY NOT NULL,
        model TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        state_epoch INTEGER,
        position INTEGER,
        replica INTEGER NOT NULL,
        holder INTEGER,
        token INTEGER,
        expires_at REAL,
        request_id TEXT,
        blob BLOB,
        checkpoints BLOB,
        reason INTEGER,
        forget_at REAL
    )
    """,
    "CREATE INDEX living_by_expiry ON sessions (expires_at, model) WHERE reason IS NULL",
    "CREATE INDEX living_by_model ON sessions (model, session_id) WHERE reason IS NULL",
    "CREATE INDEX ended_by_time ON sessions (forget_at) WHERE reason IS NOT NULL",
)

# Statements are compiled for so many rows at most, and for these numbers of rows only, so that they stay in the cache.
_STATEMENT_ROWS = (256, 64, 16, 4, 1)

_DELETE = "DELETE FROM sessions WHERE session_id IN (SELECT session_id FROM sessions WHERE {} LIMIT ?)"
_DELETE_ENDED = _DELETE.format("reason IS NOT NULL AND forget_at <= ?")
_DELETE_EXPIRED = _DELETE.format("reason IS NULL AND expires_at <= ?")

Value = str | int | float | bytes | None


@dataclass(frozen=True, slots=True)
class _Upsert:
    """Columns that are written, session_id first, and those of them that an existing row takes over."""

    columns: tuple[str, ...]
    update: tuple[str, ...]


_FACTS = ("model", "epoch", "state_epoch", "position", "replica", "holder", "token", "request_id", "reason")
_CONTENT = ("expires_at", "blob", "checkpoints")


class Write(Enum):
    """Ways to write a row; the columns' order is that of the values."""

    PUT = _Upsert(("session_id", *_FACTS, *_CONTENT, "forget_at"), (*_FACTS, *_CONTENT, "forget_at"))
    # Of rows that are there. They name the columns that no row may lack for the sake of the INSERT.
    SAVE = _Upsert(
        ("session_id", "model", "epoch", "state_epoch", "position", "replica", "holder", "request_id", *_CONTENT),
        ("epoch", "state_epoch", "position", "holder", "request_id", *_CONTENT),
    )
    TAKE = _Upsert(("session_id", "model", "epoch", "replica", "holder"), ("epoch", "replica", "holder"))


class Writes:
    """Collects the rows that a batch writes; they reach the tables in any order, but for those of one session."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._values: dict[Write, list[Value]] = {write: [] for write in Write}
        self._write_by_id: dict[str, Write] = {}

    def add(self, write: Write, session_id: str, *values: Value) -> None:
        """Write a row, after what was written of the session before."""
        if self._write_by_id.setdefault(session_id, write) is not write:
            self.flush()
            self._write_by_id[session_id] = write
        self._values[write].append(session_id)
        self._values[write] += values

    def flush(self) -> None:
        """Let the tables have everything that was collected."""
        for write, values in self._values.items():
            _write_rows(self._connection, write, values)
            values.clear()
        self._write_by_id.clear()


def delete_forgotten(connection: sqlite3.Connection, *, now: float, gone_before: float, max_rows: int) -> None:
    """Delete the memory of sessions that is over, and rows that expired at `gone_before`; so many of each at most."""
    connection.execute(_DELETE_ENDED, (now, max_rows))
    connection.execute(_DELETE_EXPIRED, (gone_before, max_rows))


def _write_rows(connection: sqlite3.Connection, write: Write, values: Sequence[Value]) -> None:
    width, start = len(write.value.columns), 0
    for num_rows in _STATEMENT_ROWS:
        while len(values) - start >= num_rows * width:
            connection.execute(_statement(write, num_rows), values[start : start + num_rows * width])
            start += num_rows * width


@cache
def _statement(write: Write, num_rows: int) -> str:
    columns, update = write.value.columns, write.value.update
    row = f"({', '.join('?' * len(columns))})"
    # No checkpoints leaves those that are stored; a PUT makes the row anew.
    kept = {"checkpoints": "coalesce(excluded.checkpoints, checkpoints)"} if write is Write.SAVE else {}
    assignments = ", ".join(f"{column} = {kept.get(column, f'excluded.{column}')}" for column in update)
    return (
        f"INSERT INTO sessions ({', '.join(columns)}) VALUES {', '.join([row] * num_rows)} "  # noqa: S608 - our own names
        f"ON CONFLICT (session_id) DO UPDATE SET {assignments}"
    )
