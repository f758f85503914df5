"""Connections cut at any byte: in the middle of a frame, of a header, of an answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle

import pytest

from cellserve import AsyncClient
from tests.client.scripted_calls import MODEL
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_sessions import digests


class Cable:
    """A TCP relay that breaks each connection after so many bytes, counted in both directions together."""

    def __init__(self, server: ScriptedServer, lengths: list[int]) -> None:
        self._server = server
        self._lengths = cycle(lengths)
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_cuts = 0
        self.is_whole = False

    @asynccontextmanager
    async def plugged(self) -> AsyncIterator[str]:
        relay = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        finally:
            relay.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        left = [next(self._lengths)]
        for source, target in ((reader, server_writer), (server_reader, writer)):
            task = asyncio.create_task(self._relay(source, target, left, [writer, server_writer]))
            self._tasks.add(task)

    async def _relay(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        left: list[int],
        writers: list[asyncio.StreamWriter],
    ) -> None:
        try:
            while data := await source.read(65536):
                if not self.is_whole and len(data) >= left[0]:
                    target.write(data[: left[0]])
                    await target.drain()
                    self.num_cuts += 1
                    break
                left[0] -= len(data)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            for writer in writers:
                writer.close()


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    yield server
    await server.stop()
    assert server.mistakes == []


@pytest.mark.parametrize("first_length", [900, 1100, 1300, 1501, 1777])
async def test_wherever_connections_are_cut_every_token_is_consumed_once(
    server: ScriptedServer, first_length: int
) -> None:
    # Some too short to bring anything through, so that there is a pause before the next.
    cable = Cable(server, [first_length, 300, first_length + 37, 1700, 120, 2000])
    async with cable.plugged() as target, AsyncClient(target, timeout_seconds=30) as client:
        session = await client.open_session(MODEL, id="cut", durability="periodic")
        tokens: list[int] = []
        for number in range(25):
            run = list(range(number, number + 1 + number % 4))
            tokens += run
            result = await session.step(run)
            assert result.next_token is not None
            assert result.next_token.tolist() == digests(tokens, len(tokens) - len(run))
            if number == 12:
                await server.restart()
        generated = [token async for token in session.generate(8, seed=1)]
        cable.is_whole = True
        await session.step(1)
        assert server.sessions.resident["cut"].row.tokens == [*tokens, *generated, 1]
        assert cable.num_cuts > 3
