"""What befalls a state store while servers use it, and how it heals: context managers."""

import contextlib
import os
import resource
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess

__all__ = ["database_locked", "disk_full", "disk_of", "files_limited", "redis_killed", "redis_paused"]


@contextlib.contextmanager
def redis_killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@contextlib.contextmanager
def redis_paused(server: RedisServer) -> Iterator[None]:
    server.pause()
    yield
    server.resume()


@contextlib.contextmanager
def database_locked(path: Path) -> Iterator[None]:
    """Another process, or as good as one, writes and does not come to an end."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def files_limited(server: ServerProcess) -> Iterator[None]:
    """The server can write to its files no more, not even to its log."""
    assert server.process is not None
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (100, limits[1]))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def disk_of(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A small disk of its own, where this user may mount one; the test is skipped elsewhere."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root can fill a disk of its own")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def disk_full(folder: Path) -> Iterator[None]:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    yield
    filler.unlink()
