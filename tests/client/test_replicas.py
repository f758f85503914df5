"""Several servers of one state store: sessions are spread, and move when a server stops, dies or comes back."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession, Client
from cellserve._placement import preferred
from cellserve._resolving import Addresses
from cellserve.errors import ConnectionLost, SessionMoved, SessionNotFound, Unavailable
from tests.client.scripted_calls import MODEL
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_sessions import Store, digests, sampled

INTERNAL = grpc.StatusCode.INTERNAL


@pytest.fixture
async def servers() -> AsyncIterator[list[ScriptedServer]]:
    store = Store()
    servers = [ScriptedServer(store) for _ in range(3)]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()
        assert server.mistakes == []


@pytest.fixture
async def client(servers: list[ScriptedServer]) -> AsyncIterator[AsyncClient]:
    async with AsyncClient([server.target for server in servers], timeout_seconds=20) as client:
        yield client


def home(servers: list[ScriptedServer], session_id: str) -> ScriptedServer:
    """The server that a session prefers."""
    target = preferred(session_id, [server.target for server in servers])
    return next(server for server in servers if server.target == target)


def attached(server: ScriptedServer) -> set[str]:
    return {session.id for session in server.sessions.resident.values() if session.stream is not None}


def seen_by(servers: list[ScriptedServer], name: str) -> int:
    return sum(server.seen.count(name) for server in servers)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def opened(client: AsyncClient, count: int = 30) -> list[AsyncSession]:
    return await client.open_sessions(MODEL, [f"session-{number}" for number in range(count)])


async def step_all(client: AsyncClient, sessions: list[AsyncSession], history: list[int], token: int) -> None:
    """Steps every session by the token, singly and together, and checks the answers."""
    for one in (token, token + 1):
        history.append(one)
        if one == token:
            results = await asyncio.gather(*(session.step(one) for session in sessions))
        else:
            results = list(await client.step_many(sessions, np.full(len(sessions), one)))
        for result in results:
            assert result.next_token is not None
            assert (result.position, result.next_token.tolist()) == (len(history), digests(history, len(history) - 1))


async def test_sessions_are_spread_over_the_servers_as_they_prefer(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    sessions = await opened(client)
    await step_all(client, sessions, [], 1)
    for server in servers:
        own = {session.id for session in sessions if home(servers, session.id) is server}
        assert attached(server) == own
        assert own
        assert len(server.streams) == 1
    assert client.target == ",".join(server.target for server in servers)
    assert [model.name for model in await client.models()] == [MODEL]
    assert await client.ping() > 0


async def test_a_server_that_dies_leaves_its_sessions_to_the_others_and_gets_them_back(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    sessions, history = await opened(client), list[int]()
    await step_all(client, sessions, history, 1)
    dead = servers[1]
    own = attached(dead)
    await dead.kill()
    await step_all(client, sessions, history, 3)
    assert attached(servers[0]) | attached(servers[2]) == {session.id for session in sessions}
    num_opens = [server.seen.count("open") for server in servers]
    await dead.start()
    await step_all(client, sessions, history, 5)
    await until(lambda: servers[0].seen.count("detach") + servers[2].seen.count("detach") > 0)
    await until(lambda: not own & (attached(servers[0]) | attached(servers[2])))
    await step_all(client, sessions, history, 7)
    assert attached(dead) == own
    # Nobody else's session has moved.
    assert [servers[0].seen.count("open"), servers[2].seen.count("open")] == [num_opens[0], num_opens[2]]


async def test_what_was_on_its_way_to_a_server_that_dies_is_answered_by_another(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, id="followed")
    await session.step([1, 2])
    dead = home(servers, "followed")
    dead.may_run.clear()
    steps = [asyncio.create_task(session.step([token])) for token in (3, 4)]
    await asyncio.sleep(0.05)
    await dead.kill()
    results = await asyncio.gather(*steps)
    assert [result.position for result in results] == [3, 4]
    (other,) = [server for server in servers if "followed" in server.sessions.resident]
    assert other.sessions.resident["followed"].row.tokens == [1, 2, 3, 4]


async def test_a_stream_that_only_breaks_moves_nothing(servers: list[ScriptedServer], client: AsyncClient) -> None:
    sessions, history = await opened(client), list[int]()
    await step_all(client, sessions, history, 1)
    before = [attached(server) for server in servers]
    for server in servers:
        server.break_streams()
    await step_all(client, sessions, history, 3)
    assert [attached(server) for server in servers] == before


async def test_a_server_that_drains_is_left_before_it_stops(servers: list[ScriptedServer], client: AsyncClient) -> None:
    sessions, history = await opened(client), list[int]()
    await step_all(client, sessions, history, 1)
    leaving = servers[0]
    own = attached(leaving)
    leaving.drain()
    await until(lambda: not attached(leaving))
    assert {name: len(leaving.store.rows[name].tokens) for name in own} == dict.fromkeys(own, 2)
    runs_before = [len(server.sessions.runs) for server in servers]
    await step_all(client, sessions, history, 3)
    # Nothing was lost by the move, so nothing is replayed.
    assert sum(len(server.sessions.runs) for server in servers) - sum(runs_before) == 2 * len(sessions)
    assert attached(leaving) == set()
    await leaving.kill()
    await step_all(client, sessions, history, 5)


async def test_a_server_that_drains_while_steps_are_on_their_way_finishes_them_or_leaves_them_to_others(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, id="followed")
    leaving = home(servers, "followed")
    steps = [asyncio.create_task(session.step(token)) for token in range(50)]
    await asyncio.sleep(0)
    leaving.drain()
    results = await asyncio.gather(*steps)
    assert [result.position for result in results] == list(range(1, 51))
    await session.step(50)
    (other,) = [server for server in servers if server is not leaving and "followed" in server.sessions.resident]
    assert other.sessions.resident["followed"].row.tokens == list(range(51))


async def test_with_one_target_a_draining_server_is_waited_out() -> None:
    server = ScriptedServer()
    await server.start()
    async with AsyncClient(server.target, timeout_seconds=20) as client:
        session = await client.open_session(MODEL, id="followed")
        await session.step([1, 2])
        server.drain()
        step = asyncio.create_task(session.step(3))
        await asyncio.sleep(0.1)
        assert not step.done()
        server.persist()
        await server.restart()
        assert (await step).position == 3
    await server.stop()


async def test_calls_about_a_session_go_where_it_is(servers: list[ScriptedServer], client: AsyncClient) -> None:
    session = await client.open_session(MODEL, id="followed")
    await session.step([1, 2])
    at_home = home(servers, "followed")
    await session.checkpoint("two")
    await session.step(3)
    await session.rollback("two")
    assert [token async for token in session.generate(2, seed=1)] == [
        sampled(1, [1, 2]),
        sampled(1, [1, 2, sampled(1, [1, 2])]),
    ]
    fork = await session.fork()
    await fork.export_state()
    for server in servers:
        if server is not at_home:
            assert {"CheckpointSession", "RollbackSession", "Generate", "ForkSession"}.isdisjoint(server.seen)
    await at_home.kill()
    await session.export_state()
    assert (await fork.step(1)).position == 5
    await session.close()
    assert at_home.store.ended == {"followed": "SESSION_CLOSED"}


@pytest.mark.parametrize("point", ["token 7", "detach", "after detach"])
async def test_a_generate_goes_on_at_another_server(
    servers: list[ScriptedServer], client: AsyncClient, point: str
) -> None:
    session = await client.open_session(MODEL, id="followed")
    await session.step([1, 2])
    at_home, tokens = home(servers, "followed"), []
    at_home.break_at.append((point, INTERNAL))
    async for token in session.generate(20, seed=5):
        tokens.append(token)
        if len(tokens) == 5:
            at_home.drain()  # takes nothing more; the session is asked for elsewhere
    expected = [1, 2]
    for _ in range(20):
        expected.append(sampled(5, expected))
    assert tokens == expected[2:]
    assert at_home.break_at == []
    assert (await session.step(3)).position == 23


async def test_a_session_without_durability_stays_where_it_is(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, id="followed", durability="none")
    await session.step(1)
    at_home = home(servers, "followed")
    at_home.break_streams()
    assert (await session.step(2)).position == 2
    await at_home.kill()
    with pytest.raises(ConnectionLost):
        await session.step(3, timeout_seconds=0.5)
    await at_home.start()
    with pytest.raises(SessionNotFound):
        await session.step(3)


async def test_a_session_taken_by_another_client_at_another_server_is_moved_for_good(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, id="followed")
    await session.step(1)
    at_home = home(servers, "followed")
    at_home.persist()
    other_server = next(server for server in servers if server is not at_home)
    async with AsyncClient(other_server.target) as other:
        winner = await other.open_session(MODEL, id="followed")
        for _ in range(2):
            with pytest.raises(SessionMoved):
                await session.step(2)
        assert (await winner.step(2)).position == 2


async def test_where_no_server_is_left_steps_wait_for_any(servers: list[ScriptedServer], client: AsyncClient) -> None:
    sessions, history = await opened(client), list[int]()
    await step_all(client, sessions, history, 1)
    for server in servers:
        await server.kill()
    with pytest.raises(Unavailable):
        await sessions[0].step(99, timeout_seconds=0.3)
    with pytest.raises(Unavailable):
        await client.ping(timeout_seconds=1)
    stepping = asyncio.create_task(step_all(client, sessions, history, 3))
    await asyncio.sleep(0.1)
    await servers[2].start()
    await stepping
    assert len(attached(servers[2])) == len(sessions)


async def test_servers_that_die_in_turns_lose_nothing(servers: list[ScriptedServer], client: AsyncClient) -> None:
    sessions, history = await opened(client, 12), list[int]()
    for number in range(6):
        server = servers[number % 3]
        stepping = asyncio.create_task(step_all(client, sessions, history, 10 * number))
        await asyncio.sleep(0.002 * number)
        await server.kill()
        await stepping
        await server.start()
        for one in servers:
            one.persist()
    await step_all(client, sessions, history, 99)


async def test_the_blocking_client_takes_several_targets_too(servers: list[ScriptedServer]) -> None:
    def work() -> list[int]:
        with Client([server.target for server in servers]) as client:
            sessions = client.open_sessions(MODEL, 20)
            return [session.step(1).position for session in sessions]

    assert await asyncio.to_thread(work) == [1] * 20
    assert all(seen_by([server], "run") for server in servers)


async def test_a_name_stands_for_all_its_addresses_and_is_resolved_again(
    servers: list[ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [servers[0], servers[1]]
    loop = asyncio.get_running_loop()
    asked: list[tuple[object, object]] = []

    async def getaddrinfo(host: object, port: object, **_: object) -> list[tuple[object, ...]]:
        asked.append((host, port))
        if not found:
            raise socket.gaierror("no such name")
        return [(0, 0, 0, "", ("127.0.0.1", server.port)) for server in found]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    async with AsyncClient("dns:///cells.internal:50051", timeout_seconds=20) as client:
        sessions, history = await opened(client), list[int]()
        await step_all(client, sessions, history, 1)
        assert asked == [("cells.internal", "50051")]
        assert attached(servers[0])
        assert attached(servers[1])
        assert client.target == "dns:///cells.internal:50051"
        found[0] = servers[2]
        await servers[0].kill()
        await step_all(client, sessions, history, 3)
        await until(lambda: servers[1].seen.count("detach") > 0)
        await step_all(client, sessions, history, 5)
        assert attached(servers[2])


async def test_a_name_without_an_address_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[object]:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with AsyncClient("dns:///nowhere.internal:1") as client:
        with pytest.raises(Unavailable, match="resolved"):
            await client.models(timeout_seconds=0.1)


@pytest.mark.parametrize("target", ["", [], ["a:1", "a:1"], ["a:1", ""]])
def test_targets_are_named_and_all_different(target: str | list[str]) -> None:
    with pytest.raises(ValueError, match="target"):
        AsyncClient(target)


async def test_addresses_are_told_apart_by_family() -> None:
    addresses = Addresses("dns:///localhost:7")
    assert set(await addresses.resolve()) <= {"127.0.0.1:7", "[::1]:7"}
    assert addresses.authority == "localhost:7"
    assert Addresses("localhost:7").authority is None


async def test_a_session_that_is_busy_is_moved_later_and_holds_nobody_else_up(
    servers: list[ScriptedServer], client: AsyncClient
) -> None:
    sessions, history = await opened(client), list[int]()
    await step_all(client, sessions, history, 1)
    first, second = servers[0], servers[1]
    busy = next(session for session in sessions if session.id in attached(first))
    generation = busy.generate(1000, seed=1)
    await anext(generation)
    first.may_generate.clear()
    first.drain()
    await until(lambda: attached(first) == {busy.id})
    second.drain()
    await until(lambda: not attached(second))
    first.may_generate.set()
    await generation.aclose()
    await until(lambda: not attached(first))
    assert (await busy.step(3)).position >= 4
