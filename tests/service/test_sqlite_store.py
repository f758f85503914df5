"""What befalls a SQLite file: full disks, damage, locks, killed writers, other versions."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores.operations import (
    Claim,
    ClaimMode,
    End,
    Listed,
    ListRows,
    Load,
    Loaded,
    Row,
    Save,
    StoreError,
    Written,
)
from cellserve_service.stores.sqlite import SqliteStore

NOW = 1_700_000_000.0
ENDED_MEMORY_SECONDS = 600.0

# Writes batches of 50 rows that all say how many batches there were, and prints the number of each that is durable.
WRITER = """
import asyncio, sys
from pathlib import Path
from cellserve_service.stores.operations import Row, Save
from cellserve_service.stores.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]), replica=1, ended_memory_seconds=600)
    await store.open()
    for number in range(1, 1_000_000):
        rows = [Row(f"s{i}", "gru", 1, number, 0, 1.7e9 + 3600, "", bytes(2300)) for i in range(50)]
        await store.apply([Save(row) for row in rows], now=1.7e9)
        print(number, flush=True)

asyncio.run(main())
"""


def a_row(session_id: str = "s", *, position: int = 0, num_bytes: int = 10) -> Row:
    return Row(session_id, "gru", 1, position, 0, NOW + 3600, "", bytes(num_bytes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cells.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, replica=1, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    await store.open()
    yield store
    await store.close()


def remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def read(path: Path) -> bytes:
    return path.read_bytes()


def replace_file(path: Path, content: bytes) -> None:
    remove(path)
    path.write_bytes(content)


def start_writer(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


async def refused(store: SqliteStore, *rows: Row) -> str:
    """What the store says when it does not take the rows."""
    with pytest.raises(StoreError) as caught:
        await store.apply([Save(row) for row in rows], now=NOW)
    said = str(caught.value)
    assert "/" not in said
    assert "\n" not in said
    return said


async def save(store: SqliteStore, *rows: Row) -> None:
    assert await store.apply([Save(row) for row in rows], now=NOW) == [Written.WRITTEN] * len(rows)


async def listed(store: SqliteStore) -> list[Row]:
    (page,) = await store.apply([ListRows("", "", 1000)], now=NOW)
    assert isinstance(page, Listed)
    return [row for row, _ in page.rows]


def count(path: Path) -> int:
    """Rows in the file, those that ended included."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (number,) = connection.execute("SELECT count(*) FROM sessions").fetchone()
        return int(number)


def forbid_growth(store: SqliteStore) -> None:
    """Let SQLite find the disk full: it is given no page beyond those there are, until the file is opened again."""
    connection = store._connection
    assert connection is not None
    store._thread.submit(connection.execute, "PRAGMA max_page_count = 1").result()


async def test_a_full_disk_is_told_and_nothing_of_the_batch_is_kept_until_there_is_room(store: SqliteStore) -> None:
    await save(store, a_row("first"))
    forbid_growth(store)
    rows = [a_row(str(number), num_bytes=2300) for number in range(50)]
    assert "the disk is full" in await refused(store, *rows)
    assert await listed(store) == [a_row("first")]
    await save(store, *rows)
    assert len(await listed(store)) == 51


async def test_a_damaged_file_is_named_so_until_it_is_replaced(store: SqliteStore, path: Path) -> None:
    rows = [a_row(f"{number:04}", num_bytes=2300) for number in range(300)]
    await save(store, *rows)
    await store.close()
    whole = read(path)
    replace_file(path, whole[:4096] + b"\xa5" * (len(whole) - 4096))
    damaged = SqliteStore(path, replica=1, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    await damaged.open()
    for _ in range(2):
        assert "is damaged" in await refused(damaged, a_row())
    replace_file(path, whole)
    assert await listed(damaged) == rows
    await damaged.close()


async def test_a_file_that_is_no_database_is_refused_until_it_is_replaced(path: Path) -> None:
    replace_file(path, b"dear diary, " * 1000)
    store = SqliteStore(path, replica=1, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    with pytest.raises(StoreError, match=r"cells\.db is not a database"):
        await store.open()
    assert "is not a database" in await refused(store, a_row())
    remove(path)
    await save(store, a_row())
    await store.close()


async def test_a_file_in_a_folder_that_there_is_not_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "none" / "cells.db", replica=1, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    with pytest.raises(StoreError, match="its folder must exist"):
        await store.open()
    await store.close()


@pytest.mark.parametrize("setup", ["PRAGMA user_version = 2", "CREATE TABLE theirs (x)"])
async def test_a_file_of_another_version_or_program_is_refused_and_left_alone(path: Path, setup: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(setup)
    before = read(path)
    store = SqliteStore(path, replica=1, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    with pytest.raises(StoreError, match=r"has schema version \d, this server writes version 1"):
        await store.open()
    await store.close()
    assert read(path) == before


async def test_a_lock_that_another_process_keeps_is_told_and_its_end_is_noticed(store: SqliteStore, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "is locked by another process" in await refused(store, a_row())
        other.execute("ROLLBACK")
    await save(store, a_row())


async def test_the_event_loop_goes_on_while_a_batch_waits_for_a_lock(store: SqliteStore, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(save(store, a_row()))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        other.execute("ROLLBACK")
        await waiting


async def test_a_file_that_is_taken_away_is_made_again(store: SqliteStore, path: Path) -> None:
    await save(store, a_row("old"))
    remove(path)
    await save(store, a_row("new"))
    assert await listed(store) == [a_row("new")]
    assert count(path) == 1


async def test_servers_that_start_together_make_one_file(path: Path) -> None:
    stores = [SqliteStore(path, replica=mark, ended_memory_seconds=ENDED_MEMORY_SECONDS) for mark in range(6)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(save(store, a_row(f"of-{mark}")) for mark, store in enumerate(stores)))
    assert len(await listed(stores[0])) == 6
    for store in stores:
        await store.close()


@pytest.mark.parametrize("num_batches", [1, 7, 30])
async def test_a_writer_that_is_killed_leaves_whole_batches(path: Path, num_batches: int) -> None:
    with start_writer(path) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(num_batches)]
        writer.kill()
        told += [int(line) for line in writer.stdout.read().split()]
    store = SqliteStore(path, replica=2, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    await store.open()
    rows = await listed(store)
    await store.close()
    assert len(rows) == 50
    (durable,) = {row.position for row in rows}
    assert durable in (told[-1], told[-1] + 1)  # the last one may have been killed before it was told


async def test_what_is_forgotten_is_deleted_some_each_second(store: SqliteStore, path: Path) -> None:
    ends = [End(str(number), ErrorReason.ERROR_REASON_SESSION_CLOSED, "", 0, NOW + 5) for number in range(600)]
    await store.apply(ends, now=NOW)
    await save(store, replace(a_row(), expires_at=NOW + 5 - ENDED_MEMORY_SECONDS), a_row("stays"))
    counts = []
    for now in (NOW + 4, NOW + 5, NOW + 5.5, NOW + 6):
        await store.apply([Load("stays")], now=now)
        counts.append(count(path))
    assert counts == [602, 101, 101, 1]
    assert await store.apply([Load("stays")], now=NOW + 7) == [Loaded(a_row("stays"), 1)]


async def test_nobody_is_told_of_moved_sessions(store: SqliteStore) -> None:
    told: list[str] = []
    watching = asyncio.create_task(store.watch(lambda session_id, _: told.append(session_id)))
    other = SqliteStore(store._path, replica=2, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    await save(store, a_row())
    await other.apply([Claim("s", None, ClaimMode.ATTACH)], now=NOW)
    assert not watching.done()
    watching.cancel()
    await other.close()
    assert told == []
    assert store.warnings == []
