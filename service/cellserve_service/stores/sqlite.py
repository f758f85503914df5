"""Keeps rows in a SQLite file: for servers of one machine, which may share it."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cellserve_service.stores.operations import Operation, Outcome, StateStore, StoreError
from cellserve_service.stores.sqlite_batch import Batch
from cellserve_service.stores.sqlite_writes import SCHEMA, SCHEMA_VERSION, delete_forgotten

__all__ = ["SqliteStore"]

BUSY_SECONDS = 2.0
FORGET_INTERVAL_SECONDS = 1.0
FORGET_ROWS = 500  # of a kind in a batch: answers wait for it

_CHECKPOINT_PAGES = 4000
_CACHE_KIBIBYTES = 16384

_CAUSES = {
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_LOCKED: "is locked by another process",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore or replace it, its -wal and -shm files included",
    sqlite3.SQLITE_NOTADB: "is not a database: restore or replace it",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: its folder must exist, and this user must be allowed to write there",
    sqlite3.SQLITE_READONLY: "cannot be written: this user must be allowed to write it and its folder",
    sqlite3.SQLITE_PERM: "cannot be opened: this user must be allowed to write it",
}

T = TypeVar("T")


class SqliteStore(StateStore):
    """Rows in a file. A thread of its own does the work, so that the event loop never waits for the disk."""

    def __init__(self, path: Path, *, replica: int, ended_memory_seconds: float) -> None:
        self.warnings: list[str] = []
        self._path = path
        self._replica = replica
        self._ended_memory_seconds = ended_memory_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-store")
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._forgot_at: float | None = None
        self._is_closed = False

    async def open(self) -> None:
        """Open the file, or make it. Raises StoreError."""
        await self._in_thread(lambda: None)

    async def apply(self, operations: Sequence[Operation], *, now: float) -> list[Outcome]:
        """Do the operations in one transaction. Raises StoreError."""

        def work() -> list[Outcome]:
            return self._apply(operations, now)

        return await self._in_thread(work)

    async def watch(self, moved: Callable[[str, int], None]) -> None:
        """Wait until it is cancelled: nobody tells a file's other users anything."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Close the file; once more does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, work)

    def _attempt(self, work: Callable[[], T]) -> T:
        try:
            self._connect()
            return work()
        except (sqlite3.Error, OSError) as error:
            # What a connection knows of a file that failed is not worth keeping; closing it rolls back.
            self._disconnect()
            raise StoreError(f"the database file {self._path.name} {_cause(error)}") from error
        except BaseException:
            self._disconnect()
            raise

    def _apply(self, operations: Sequence[Operation], now: float) -> list[Outcome]:
        connection = self._connection
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        memory = self._ended_memory_seconds
        batch = Batch(connection, replica=self._replica, now=now, ended_memory_seconds=memory)
        outcomes = batch.apply(operations)
        if self._forgot_at is None or abs(now - self._forgot_at) >= FORGET_INTERVAL_SECONDS:
            delete_forgotten(connection, now=now, gone_before=now - memory, max_rows=FORGET_ROWS)
            self._forgot_at = now
        connection.execute("COMMIT")
        return outcomes

    def _connect(self) -> None:
        """Have a connection to the file that is at the path now: what goes to one that was moved away is lost."""
        if self._connection is not None and self._file == _identity(self._path):
            return
        self._disconnect()
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
        self._connection = connection
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        connection.execute("BEGIN")  # version and tables as of one moment: another server may be making them
        is_new = _is_new(connection)
        connection.execute("COMMIT")
        _change_to_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        if is_new:
            _make_tables(connection)
        self._file = _identity(self._path)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # a damaged file may refuse even this
                connection.close()


def _is_new(connection: sqlite3.Connection) -> bool:
    """Whether the file is empty. Raises StoreError where it is of another version, or of another program."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version == 0 and num_tables == 0:
        return True
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"the database file has schema version {version}, this server writes version {SCHEMA_VERSION}: "
            "name another file, or run the server that made it"
        )
    return False


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    if _is_new(connection):  # another server may have been faster
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _change_to_wal(connection: sqlite3.Connection) -> None:
    """Unlike all else, this fails at once while another server opens the same new file."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _cause(error: sqlite3.Error | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot be used: {error.strerror or type(error).__name__}"
    code = getattr(error, "sqlite_errorcode", None)
    name = getattr(error, "sqlite_errorname", None)
    cause = None if code is None else _CAUSES.get(code & 0xFF)  # the low byte is the kind, the rest its detail
    if cause is None and name is not None and name.startswith("SQLITE_IOERR"):
        return f"cannot be read or written ({name}): check the disk, and that it has room"
    return cause or f"cannot be used: {error}"
