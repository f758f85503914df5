"""The processes that a benchmark needs beside its own, which is the client: workers, the echo, the naive server."""

from __future__ import annotations

import asyncio
import importlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

__all__ = ["PeerServer", "Worker", "echo_server", "naive_server"]

_START_SECONDS: Final = 60.0


class Worker:
    """A process of its own that runs functions of one module, so that this one never imports what they need."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))

    async def call(self, function: str, /, *arguments: object, **named: object) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _call, self._module, function, arguments, named)

    def call_now(self, function: str, /, *arguments: object, **named: object) -> Any:
        """The same where no event loop runs."""
        return self._pool.submit(_call, self._module, function, arguments, named).result()

    def close(self) -> None:
        self._pool.shutdown()


def _call(module: str, function: str, arguments: tuple[object, ...], named: dict[str, object]) -> object:
    return getattr(importlib.import_module(module), function)(*arguments, **named)


@dataclass(frozen=True, slots=True)
class PeerServer:
    """A server that runs."""

    target: str
    pid: int


@contextmanager
def echo_server() -> Iterator[PeerServer]:
    """A raw echo."""
    with _peer("bench.echo_server") as server:
        yield server


@contextmanager
def naive_server(directory: Path) -> Iterator[PeerServer]:
    """The afternoon's server of a model directory."""
    with _peer("bench.naive_server", str(directory)) as server:
        yield server


@contextmanager
def _peer(module: str, *arguments: str) -> Iterator[PeerServer]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", module, str(port), *arguments], process_group=0)
    try:
        _wait_for(port, process)
        yield PeerServer(f"127.0.0.1:{port}", process.pid)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"the process on port {port} does not listen") from None
            time.sleep(0.05)
