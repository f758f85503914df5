"""A generate whose connection breaks, or whose server dies, goes on with the same tokens."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from cellserve import AsyncClient, AsyncSession, Client
from cellserve.errors import ConnectionLost, SessionBusy, SessionNotFound, TokensLost, Unavailable
from tests.client.scripted_calls import MODEL
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_sessions import sampled

INTERNAL = grpc.StatusCode.INTERNAL
PROMPT = [1, 2, 3]


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    yield server
    server.may_generate.set()
    await server.stop()
    assert server.mistakes == []


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout_seconds=20) as client:
        yield client


@pytest.fixture
async def session(client: AsyncClient) -> AsyncSession:
    session = await client.open_session(MODEL, id="followed")
    await session.step(PROMPT)
    return session


def consumed(server: ScriptedServer) -> list[int]:
    return server.sessions.resident["followed"].row.tokens


def expected(seed: int, count: int, prompt: list[int] = PROMPT) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sampled(seed, tokens))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "code", [INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK], ids=lambda code: code.name
)
async def test_a_call_that_breaks_is_taken_up_where_it_was(
    server: ScriptedServer, session: AsyncSession, code: grpc.StatusCode
) -> None:
    server.break_at += [("Generate", INTERNAL), ("token 5", code), ("token 5", code), ("token 9", code)]
    generation = session.generate(20, seed=7)
    tokens = [token async for token in generation]
    assert tokens == expected(7, 20)
    assert (generation.finish_reason, session.position, server.break_at) == ("length", 23, [])
    assert consumed(server) == [*PROMPT, *tokens]
    assert (await session.step(4)).position == 24


async def test_the_seed_is_the_clients_own_and_known_at_once(server: ScriptedServer, session: AsyncSession) -> None:
    generation = session.generate(5)
    seed = generation.seed
    server.break_at.append(("token 5", INTERNAL))
    assert [token async for token in generation] == expected(seed, 5)
    assert generation.seed == seed


async def test_a_server_that_died_gets_the_tokens_that_it_had_sampled(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.persist()
    tokens = []
    async for token in session.generate(30, seed=3):
        tokens.append(token)
        if len(tokens) in (4, 17):
            await server.restart()
    assert tokens == expected(3, 30)
    await server.restart()
    assert (await session.step(4)).position == 34
    assert consumed(server) == [*PROMPT, *tokens, 4]


async def test_tokens_that_the_server_had_sampled_ahead_are_received_all_the_same(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.may_generate.clear()
    generation = session.generate(10, seed=3)
    first = asyncio.create_task(anext(generation))
    while "Generate" not in server.seen:
        await asyncio.sleep(0)
    server.sessions.resident["followed"].row.tokens += expected(3, 4)
    server.may_generate.set()
    server.break_at.append(("token 3", INTERNAL))
    tokens = [await first, *[token async for token in generation]]
    assert tokens == expected(3, 10)


async def test_a_last_word_that_is_lost_is_known_without_it(server: ScriptedServer, session: AsyncSession) -> None:
    tokens = expected(5, 8)
    server.break_at.append(("after last token", INTERNAL))
    generation = session.generate(8, seed=5)
    assert [token async for token in generation] == tokens
    assert generation.finish_reason == "length"
    server.break_at.append(("after last token", grpc.StatusCode.OK))
    prompt = consumed(server)[:]
    stop = expected(6, 3, prompt)[-1]
    generation = session.generate(100, seed=6, stop=[stop])
    assert [token async for token in generation] == expected(6, 3, prompt)
    assert generation.finish_reason == "stop"
    assert (await session.step(1)).position == len(PROMPT) + 8 + 3 + 1


async def test_a_server_that_still_runs_the_call_that_broke_is_asked_again(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.break_at.append(("token 5", INTERNAL))
    generation = session.generate(6, seed=1)
    tokens = [await anext(generation), await anext(generation)]
    server.refuse += [("Generate", "SESSION_BUSY")] * 2
    tokens += [token async for token in generation]
    assert tokens == expected(1, 6)
    assert server.refuse == []
    server.refuse.append(("Generate", "SESSION_BUSY"))
    with pytest.raises(SessionBusy):  # somebody else's
        await anext(session.generate(5))


async def test_steps_meanwhile_are_refused_through_every_break(server: ScriptedServer, session: AsyncSession) -> None:
    generation = session.generate(10, seed=2)
    tokens = [await anext(generation)]
    await server.kill()
    following = asyncio.create_task(anext(generation))
    await asyncio.sleep(0.1)
    with pytest.raises(SessionBusy):
        await session.step(1)
    await server.start()
    tokens += [await following, *[token async for token in generation]]
    assert tokens == expected(2, 10)


async def test_no_server_until_the_timeout_is_unavailable_and_the_session_just_works_afterwards(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.persist()
    generation = session.generate(1000, seed=2, timeout_seconds=0.3)
    tokens = [await anext(generation), await anext(generation)]
    server.may_generate.clear()
    server.persist()
    await server.kill()
    with pytest.raises(Unavailable):
        while True:
            tokens.append(await anext(generation))
    server.may_generate.set()
    await server.start()
    position = (await session.step(4)).position
    assert consumed(server)[: len(PROMPT) + len(tokens)] == [*PROMPT, *tokens]
    assert consumed(server)[-1] == 4
    assert position == len(consumed(server))


async def test_breaking_off_keeps_even_the_tokens_that_were_not_received(
    server: ScriptedServer, session: AsyncSession
) -> None:
    generation = session.generate(1000, seed=9)
    for _ in range(3):
        await anext(generation)
    server.may_generate.clear()
    await asyncio.sleep(0.05)
    await generation.aclose()
    server.may_generate.set()
    position = (await session.step(4)).position
    before = consumed(server)[:]
    await server.restart()  # with the state of before the prompt
    assert (await session.step(5)).position == position + 1
    assert consumed(server) == [*before, 5]


async def test_a_session_without_durability_is_gone_with_its_server(
    server: ScriptedServer, client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, durability="none")
    generation = session.generate(1000)
    await anext(generation)
    server.may_generate.clear()
    server.break_streams()
    await server.restart()
    with pytest.raises(SessionNotFound):
        async for _ in generation:
            pass


async def test_a_session_that_lacks_tokens_which_nobody_has_says_so(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.persist()
    while session.durable_position != 3:
        await asyncio.sleep(0)
    generation = session.generate(1000)
    await anext(generation)
    server.may_generate.clear()
    server.store.rows["followed"].tokens = [1]
    await server.restart()
    server.may_generate.set()
    with pytest.raises(TokensLost):
        async for _ in generation:
            pass


async def test_a_fork_that_generates_survives_its_server(server: ScriptedServer, session: AsyncSession) -> None:
    fork = await session.fork("followed-too")
    tokens = []
    async for token in fork.generate(10, seed=4):
        tokens.append(token)
        if len(tokens) == 5:
            await server.restart()
    assert tokens == expected(4, 10)
    await fork.step(5)
    assert server.sessions.resident["followed-too"].row.tokens == [*PROMPT, *tokens, 5]


async def test_the_blocking_generation_goes_on_as_well(server: ScriptedServer) -> None:
    def work() -> list[int]:
        with Client(server.target) as client, client.session(MODEL) as session:
            session.step(PROMPT)
            return list(session.generate(10, seed=8))

    server.break_at += [("token 4", INTERNAL), ("token 8", INTERNAL)]
    assert await asyncio.to_thread(work) == expected(8, 10)
    assert server.break_at == []


async def test_an_outage_that_ends_the_timeout_says_connection_lost(
    server: ScriptedServer, session: AsyncSession
) -> None:
    await server.kill()
    with pytest.raises(ConnectionLost):
        await anext(session.generate(5, timeout_seconds=0.3))
