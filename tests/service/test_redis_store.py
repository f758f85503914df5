"""What befalls a Redis: it is killed, hangs, runs full, answers late, or keeps less than it could."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores import open_store
from cellserve_service.stores.operations import (
    Claim,
    Claimed,
    ClaimMode,
    ClaimResult,
    End,
    Listed,
    ListRows,
    Load,
    Loaded,
    Row,
    Save,
    StateStore,
    StoreError,
    Written,
)
from tests.support.redis_server import RedisServer

NOW = 1_700_000_000.0
ENDED_MEMORY_SECONDS = 600.0
MINE, OTHERS = 2**64 - 1, 2
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
ATTACH = Claim("s", None, ClaimMode.ATTACH)


def a_row(session_id: str = "s", *, epoch: int = 1, position: int = 0, model: str = "gru") -> Row:
    return Row(session_id, model, epoch, position, 0, NOW + 3600, "", b"state")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, which loses nothing that it acknowledged."""
    with RedisServer(tmp_path, DURABLE) as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str, *, replica: int = MINE) -> AsyncIterator[StateStore]:
    store = open_store(url, replica=replica, ended_memory_seconds=ENDED_MEMORY_SECONDS)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


async def save(store: StateStore, *rows: Row, now: float = NOW) -> None:
    assert await store.apply([Save(row) for row in rows], now=now) == [Written.WRITTEN] * len(rows)


async def refused(store: StateStore) -> str:
    """What the store says when it does not take a batch."""
    with pytest.raises(StoreError) as caught:
        await store.apply([Save(a_row("refused"))], now=NOW)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def restart(server: RedisServer) -> None:
    """Kill the server and start it again; the event loop hears that the connections are closed."""
    server.kill()
    server.start()
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_server_that_is_killed_is_told_and_has_what_it_acknowledged_when_it_is_back(
    server: RedisServer,
) -> None:
    async with opened(server.url) as store:
        await save(store, a_row(position=3))
        server.kill()
        for _ in range(2):
            assert await refused(store) == "Redis cannot be reached"
        server.start()
        assert await store.apply([Load("s")], now=NOW) == [Loaded(a_row(position=3), 1)]
        await save(store, a_row(position=4))


async def test_a_server_that_was_started_again_between_batches_is_not_even_noticed(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await save(store, a_row())
        await restart(server)
        await save(store, a_row(position=1))


async def test_a_server_that_hangs_is_told_and_the_same_batch_can_be_sent_again(server: RedisServer) -> None:
    create = Claim("s", None, ClaimMode.CREATE, created=a_row())
    async with opened(server.url) as store:
        server.pause()
        with pytest.raises(StoreError, match="did not answer within 2 s"):
            await store.apply([create], now=NOW)
        server.resume()
        assert await store.apply([create], now=NOW) == [Claimed(ClaimResult.CREATED, 1)]
        await save(store, a_row(position=1))


async def test_a_batch_that_is_cancelled_leaves_no_answer_for_the_next_one(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await save(store, a_row())
        server.pause()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.apply([ATTACH, ATTACH], now=NOW), 0.05)
        server.resume()
        (loaded,) = await store.apply([Load("s")], now=NOW)
        assert isinstance(loaded, Loaded)
        assert loaded.row == a_row()


async def test_a_server_that_is_not_there_is_told_when_the_store_is_opened(server: RedisServer) -> None:
    server.kill()
    with pytest.raises(StoreError, match="Redis cannot be reached"):
        async with opened(server.url):
            pass


class SlowRoad:
    """A proxy before the server: what it gets while it is `holding`, it lets arrive when it is told to."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._holds = False
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._to_server: list[asyncio.StreamWriter] = []
        self._handlers: list[asyncio.Task[None]] = []
        self.late_answers: asyncio.Queue[bytes] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        """The URL by which the server is reached through the proxy."""
        proxy = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        proxy.close()
        for to_server in self._to_server:
            to_server.close()
        await asyncio.gather(*self._handlers)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        self._holds = True
        yield
        self._holds = False

    def let_go(self) -> None:
        for to_server, sent in self._held:
            to_server.write(sent)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.append(task)
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._to_server.append(to_server)
        back = asyncio.create_task(self._carry_back(from_server, writer))
        while sent := await reader.read(1 << 20):
            if self._holds:
                self._held.append((to_server, sent))
            else:
                to_server.write(sent)
        writer.close()  # who sent it has given it up; the server does not know
        await back

    async def _carry_back(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answer := await from_server.read(1 << 20):
            if writer.is_closing():
                self.late_answers.put_nowait(answer)
            else:
                writer.write(answer)


async def test_a_batch_that_was_given_up_does_nothing_when_it_arrives_late(server: RedisServer) -> None:
    road = SlowRoad(server)
    async with road.opened() as url, opened(url) as mine, opened(server.url, replica=OTHERS) as others:
        await save(mine, a_row())
        with road.holding(), pytest.raises(StoreError):
            await mine.apply([ATTACH], now=NOW)
        await mine.apply([Load("s")], now=NOW)
        assert await others.apply([ATTACH], now=NOW) == [Claimed(ClaimResult.TAKEN, 2, a_row())]
        road.let_go()
        assert (await road.late_answers.get()).startswith(b"-STALE")
        await save(others, a_row(epoch=2))


async def test_a_server_out_of_memory_is_told_and_nothing_of_the_batch_is_kept(server: RedisServer) -> None:
    async with opened(server.url) as store, Redis.from_url(server.url) as client:
        await save(store, a_row())
        await client.config_set("maxmemory", "1")
        assert await refused(store) == "Redis is out of memory: raise its maxmemory"
        await client.config_set("maxmemory", "0")
        assert await store.apply([ListRows("", "", 5)], now=NOW) == [Listed([(a_row(), 1)], 1)]


async def test_a_server_that_forgot_its_scripts_gets_this_one_again(server: RedisServer) -> None:
    async with opened(server.url) as store, Redis.from_url(server.url) as client:
        await save(store, a_row())
        await client.script_flush()
        await save(store, a_row(position=1))


async def test_sessions_of_another_version_are_refused(server: RedisServer) -> None:
    async with Redis.from_url(server.url) as client:
        await client.set("cellserve:version", "7")
    with pytest.raises(StoreError, match="schema version 7, this server writes version 1"):
        async with opened(server.url):
            pass


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (DURABLE, None),
        ((), "appendonly no"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync everysec"),
        ((*DURABLE, "--rename-command", "CONFIG", ""), "does not tell its settings"),
        ((*DURABLE, "--maxmemory", "1gb", "--maxmemory-policy", "volatile-ttl"), "maxmemory-policy volatile-ttl"),
        ((*DURABLE, "--maxmemory-policy", "volatile-ttl"), None),
    ],
)
async def test_a_server_that_may_lose_sessions_is_told_in_a_line(
    settings: tuple[str, ...], advice: str | None, tmp_path: Path
) -> None:
    with RedisServer(tmp_path, settings) as server:
        async with opened(server.url) as store:
            assert len(store.warnings) == (advice is not None)
            assert all(advice is not None and advice in line and "\n" not in line for line in store.warnings)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (("--requirepass", "secret"), "refuses the user or the password"),
        (("--replicaof", "127.0.0.1 1", "--min-replicas-to-write", "0"), "is a read-only replica"),
        (("--user", "default", "on", "nopass", "~*", "+ping", "+get"), "does not allow this user"),
    ],
)
async def test_a_server_that_cannot_be_used_says_why(settings: tuple[str, ...], cause: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, settings) as server, pytest.raises(StoreError, match=cause):
        async with opened(server.url):
            pass


async def wait_for_watcher(server: RedisServer) -> None:
    channel = f"cellserve:moved:{MINE}"
    async with Redis.from_url(server.url) as client:
        while dict(await client.pubsub_numsub(channel))[channel.encode()] != 1:
            await asyncio.sleep(0.01)


async def test_a_replica_is_told_when_another_takes_a_session_even_after_the_server_was_away(
    server: RedisServer,
) -> None:
    told: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    async with opened(server.url) as mine, opened(server.url, replica=OTHERS) as others:
        watching = asyncio.create_task(mine.watch(lambda session_id, epoch: told.put_nowait((session_id, epoch))))
        await save(mine, a_row(), a_row("a:b"))
        await wait_for_watcher(server)
        await others.apply([replace(ATTACH, epoch=5), replace(ATTACH, session_id="a:b")], now=NOW)
        assert [await told.get(), await told.get()] == [("s", 5), ("a:b", 2)]
        await restart(server)
        while told.empty():  # it may miss some before it has subscribed again
            await mine.apply([ATTACH], now=NOW)
            await others.apply([ATTACH], now=NOW)
            await asyncio.sleep(0.01)
        session_id, epoch = await told.get()
        assert session_id == "s"
        assert epoch > 5
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_nothing_is_left_of_what_is_forgotten(server: RedisServer) -> None:
    async with opened(server.url) as store, Redis.from_url(server.url) as client:
        await save(store, *(a_row(str(number), model=f"m{number % 2}") for number in range(600)))
        ends = [End(str(number), ErrorReason.ERROR_REASON_SESSION_CLOSED, "", 0, NOW + 5) for number in range(300)]
        await store.apply(ends, now=NOW)
        assert await client.pttl("cellserve:session:0") > 0
        assert await client.pttl("cellserve:session:599") > (3600 + ENDED_MEMORY_SECONDS) * 1000
        over = NOW + 3600 + ENDED_MEMORY_SECONDS
        await store.apply([], now=over)
        left = {str(key, "utf-8") for key in await client.keys() if isinstance(key, bytes)}
        # Of those that were ended Redis itself takes care.
        assert {key for key in left if ":session:" in key} == {f"cellserve:session:{number}" for number in range(300)}
        assert {key.rpartition(":")[0] for key in left if ":session:" not in key} == {"cellserve", "cellserve:batch"}


async def test_a_session_that_vanished_and_came_again_with_another_model_is_its_own(server: RedisServer) -> None:
    async with opened(server.url) as store, Redis.from_url(server.url) as client:
        await save(store, a_row(), a_row("gone"))
        await client.delete("cellserve:session:s", "cellserve:session:gone")  # as their time would
        later = NOW + 3600 + ENDED_MEMORY_SECONDS + 100
        again = replace(a_row(model="lstm"), expires_at=later + 10)
        outcomes = await store.apply([Save(again), ListRows("gru", "", 5), ListRows("", "", 5)], now=later)
        assert outcomes == [Written.WRITTEN, Listed([], 0), Listed([(again, 1)], 1)]
        assert await store.apply([ListRows("", "", 5), Load("s")], now=later + 2) == [
            Listed([(again, 1)], 1),
            Loaded(again, 1),
        ]
        assert await client.zrange("cellserve:ids:", 0, -1) == [b"s"]
