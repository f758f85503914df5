"""Sampling on the server, iterated and broken off through the client."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession, Client
from cellserve.errors import InvalidInput, OutputUnsupported
from tests.support.server import ServerProcess


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


@pytest.fixture
async def session(client: AsyncClient) -> AsyncIterator[AsyncSession]:
    async with client.session("tiny-gru") as session:
        await session.step([1, 2, 3])
        yield session


async def test_the_likeliest_tokens_are_those_that_steps_would_choose(session: AsyncSession) -> None:
    async with await session.fork() as fork:
        generated = [token async for token in fork.generate(20, temperature=0.0)]
        assert fork.position == 23
        assert (await fork.step(1)).position == 24
    result = await session.step(3)
    async with await session.fork() as fork:
        first = [token async for token in fork.generate(1, temperature=0.0)]
    assert result.next_token is not None
    assert first == result.next_token.tolist()
    assert len(generated) == 20


async def test_every_generated_token_has_been_consumed(session: AsyncSession) -> None:
    async with await session.fork() as fork:
        tokens = [token async for token in fork.generate(15, seed=1)]
        replayed = await session.step(tokens, states=True)
        continued, expected = await fork.step(5, states=True), await session.step(5, states=True)
        assert replayed.position == 18
        assert continued.states is not None
        assert expected.states is not None
        np.testing.assert_allclose(continued.states, expected.states, atol=1e-5)


async def test_the_same_seed_gives_the_same_tokens_and_is_told(session: AsyncSession) -> None:
    tokens = []
    for _ in range(2):
        async with await session.fork() as fork:
            generation = fork.generate(30, seed=99, temperature=1.3, top_k=5, top_p=0.9)
            tokens.append([token async for token in generation])
            assert (generation.seed, generation.finish_reason) == (99, "length")
    assert tokens[0] == tokens[1]
    async with await session.fork() as fork:
        generation = fork.generate(30)
        chosen = [token async for token in generation]
        seed = generation.seed
    async with await session.fork() as fork:
        assert [token async for token in fork.generate(30, seed=seed)] == chosen


async def test_a_stop_token_ends_it_and_is_the_last_one(session: AsyncSession) -> None:
    generation = session.generate(1000, stop=[0, 7], seed=3)
    tokens = [token async for token in generation]
    assert tokens[-1] in (0, 7)
    assert not {0, 7} & set(tokens[:-1])
    assert generation.finish_reason == "stop"
    assert session.position == 3 + len(tokens)


async def test_log_probabilities_are_told_where_asked_for(session: AsyncSession) -> None:
    async with await session.fork() as fork:
        generation = fork.generate(12, seed=4, temperature=0.5, logprobs=True)
        tokens = [token async for token in generation]
    result = await session.step(tokens, logprobs=True)
    assert result.logprobs is not None
    assert generation.logprobs == pytest.approx(result.logprobs.tolist(), abs=1e-4)


async def test_breaking_off_leaves_a_session_that_knows_where_it_stands(session: AsyncSession) -> None:
    received = 0
    async for _ in session.generate(100_000):
        received += 1
        if received == 10:
            break
    result = await session.step(1)
    assert result.position == session.position
    assert 3 + 10 + 1 <= result.position < 100_004
    assert (await session.step([2, 3])).position == result.position + 2


async def test_breaking_off_by_cancelling_the_task_does_the_same(session: AsyncSession) -> None:
    started = asyncio.Event()

    async def consume() -> None:
        async for _ in session.generate(100_000):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    result = await session.step(1)
    assert 4 < result.position < 100_004
    assert (await session.export_state()) != b""


async def test_a_generation_that_nobody_iterates_has_not_begun(session: AsyncSession) -> None:
    generation = session.generate(10)
    assert (await session.step(1)).position == 4
    assert len([token async for token in generation]) == 10
    assert [token async for token in generation] == []
    assert session.position == 14


async def test_what_cannot_be_generated_says_why_and_moves_nothing(client: AsyncClient, session: AsyncSession) -> None:
    for settings in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 1.5}, {"stop": [99]}):
        with pytest.raises(InvalidInput):
            async for _ in session.generate(**{"max_tokens": 5, **settings}):  # type: ignore[arg-type]
                raise AssertionError("nothing can come")
        assert (await session.export_state()) != b""
    assert (await session.step(1)).position == 4
    async with client.session("vectors-gru") as vectors:
        with pytest.raises(OutputUnsupported):
            async for _ in vectors.generate(5):
                raise AssertionError("nothing can come")


def test_a_blocking_generation_is_an_iterator_that_can_be_left(server: ServerProcess) -> None:
    with Client(server.target) as client, client.session("pycode") as session:
        session.step(b"def ")
        generation = session.generate(max_tokens=30, temperature=0.5, seed=1, stop=b"\n")
        text = bytes(generation)
        assert session.position == 4 + len(text)
        assert generation.finish_reason in ("stop", "length")
        assert text.endswith(b"\n") == (generation.finish_reason == "stop")
        for _ in session.generate(max_tokens=100_000):
            break
        assert session.step(b"x").position == session.position < 100_000
        left = session.generate(max_tokens=100_000)
        next(left)
        left.close()
        assert list(left) == []
        assert session.step(b"y").position == session.position
