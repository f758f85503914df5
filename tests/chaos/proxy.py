"""A TCP proxy that mistreats what passes: it delays, drops, repeats and cuts bytes, and breaks connections off."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np


@dataclass
class BadProxy:
    """Listens on a free port of loopback, as `target` says, and passes on to a server. An async context manager.

    mischief: how likely each kind is for one chunk of bytes. Bytes that are dropped or repeated can make other, valid
    messages of a plain connection: only TLS tells them from what was sent. Its ends find out when the next bytes come;
    before, one waits for what the other has sent.
    """

    to_port: int
    seed: int
    kinds: tuple[str, ...] = ("delay", "drop", "repeat", "cut", "break")
    mischief: float = 0.002
    target: str = ""

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.counts = dict.fromkeys(self.kinds, 0)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        while self._connections:
            await asyncio.wait(self._connections)

    def cut(self) -> None:
        """Breaks every connection off."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.to_port)
        except OSError:
            writer.transport.abort()
            self._connections.discard(task)
            return
        self._writers |= {writer, there_writer}
        passing = [
            asyncio.create_task(self._pass_on(reader, there_writer)),
            asyncio.create_task(self._pass_on(there_reader, writer)),
        ]
        try:
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in passing:
                one.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
            writer.transport.abort()
            there_writer.transport.abort()
            self._writers -= {writer, there_writer}
            self._connections.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(16384):
                if self._random.random() < self.mischief * len(self.kinds):
                    kind = self.kinds[int(self._random.integers(len(self.kinds)))]
                    self.counts[kind] += 1
                    half = chunk[: len(chunk) // 2]
                    match kind:
                        case "delay":
                            await asyncio.sleep(float(self._random.uniform(0.01, 0.3)))
                        case "drop":
                            continue
                        case "repeat":
                            chunk += chunk
                        case "cut":  # what follows comes without what was cut out
                            chunk = half
                        case "break":
                            writer.write(half)
                            await writer.drain()
                            return
                writer.write(chunk)
                await writer.drain()
