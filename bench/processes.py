"""The processes that a benchmark needs beside its own, which is the client: the reference, the echo, the server."""

from __future__ import annotations

import asyncio
import importlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

__all__ = ["Worker", "echo_server"]


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


@contextmanager
def echo_server() -> Iterator[int]:
    """A raw echo server; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "bench.echo", str(port)], process_group=0)
    try:
        yield port
    finally:
        process.kill()
        process.wait()
