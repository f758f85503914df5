"""Servers that are killed and come back on the same store: the client's callers notice nothing but time."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import CheckpointNotFound
from tests.support.oracle import Oracle
from tests.support.replicas import MODEL, Replica, StartReplica

Durability = Literal["periodic", "sync"]


@pytest.fixture
def replica(start_replica: StartReplica, store_url: str) -> Replica:
    """A server on an empty store of each kind."""
    return start_replica(store=store_url)


@pytest.fixture
async def client(replica: Replica) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(replica.server.target, timeout_seconds=60) as client:
        yield client


def oracle_of(replica: Replica) -> Oracle:
    assert replica.server.models is not None
    return Oracle(replica.server.models / MODEL / "1")


async def crash(replica: Replica) -> None:
    await asyncio.to_thread(replica.crash)


async def check(session: AsyncSession, consumed: list[int], oracle: Oracle) -> None:
    """The session has consumed these tokens, once each and in order."""
    token = len(consumed) % 11
    consumed.append(token)
    result = await session.step(token, states=True)
    assert result.position == len(consumed)
    assert result.states is not None
    np.testing.assert_allclose(result.states[-1], oracle.run(np.array(consumed)).states[-1], atol=2e-5)


async def follow(session: AsyncSession, consumed: list[int], number: int, random: np.random.Generator) -> None:
    """So many steps of a few tokens each."""
    for _ in range(number):
        tokens = random.integers(0, 11, size=int(random.integers(1, 6))).tolist()
        consumed += tokens
        await session.step(tokens)


@pytest.mark.parametrize("durability", ["periodic", "sync"])
async def test_steps_go_on_over_crashes_and_every_token_is_consumed_once(
    replica: Replica, client: AsyncClient, durability: Durability
) -> None:
    sessions = [await client.open_session(MODEL, durability=durability) for _ in range(20)]
    consumed: list[list[int]] = [[] for _ in sessions]
    for number in range(3):
        stepping = asyncio.gather(
            *(
                follow(session, tokens, 100, np.random.default_rng([number, index]))
                for index, (session, tokens) in enumerate(zip(sessions, consumed, strict=True))
            )
        )
        await asyncio.sleep(0.05 * number)
        await crash(replica)
        await stepping
    await asyncio.gather(
        *(check(session, tokens, oracle_of(replica)) for session, tokens in zip(sessions, consumed, strict=True))
    )


async def test_step_many_goes_on_over_crashes(replica: Replica, client: AsyncClient) -> None:
    sessions = await client.open_sessions(MODEL, 100)
    consumed: list[list[int]] = [[] for _ in sessions]
    random = np.random.default_rng(1)
    for number in range(30):
        counts = random.integers(1, 5, size=len(sessions))
        tokens = random.integers(0, 11, size=counts.sum())
        many = asyncio.create_task(client.step_many(sessions, tokens, counts))
        if number % 10 == 5:
            await asyncio.sleep(0)
            await crash(replica)
        positions = (await many).positions.tolist()
        for own, part in zip(consumed, np.split(tokens, np.cumsum(counts)[:-1]), strict=True):
            own += part.tolist()
        assert positions == [len(own) for own in consumed]
    for session, own in list(zip(sessions, consumed, strict=True))[::9]:
        await check(session, own, oracle_of(replica))


async def test_a_generate_goes_on_over_a_crash_with_the_same_tokens(replica: Replica, client: AsyncClient) -> None:
    # As much as a server holds of a generate, 64 slices of 16 tokens: it may be so far ahead of its reader.
    settings: dict[str, Any] = {"max_tokens": 1000, "seed": 5, "temperature": 1.5, "logprobs": True}
    session = await client.open_session(MODEL, durability="periodic")
    await session.step([1, 2, 3])
    async with await session.fork() as fork:
        undisturbed = fork.generate(**settings)
        expected = [token async for token in undisturbed]
    generation = session.generate(**settings)
    tokens = []
    async for token in generation:
        tokens.append(token)
        if len(tokens) in (300, 700):
            await crash(replica)
    assert tokens == expected
    np.testing.assert_allclose(generation.logprobs, undisturbed.logprobs, atol=1e-5)
    await check(session, [1, 2, 3, *tokens], oracle_of(replica))


async def test_a_generate_broken_off_before_a_crash_keeps_what_was_not_received(
    replica: Replica, client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, durability="periodic")
    await session.step([1, 2, 3])
    async for _ in session.generate(100_000, seed=1):
        break
    position = (await session.step(1)).position
    await crash(replica)
    assert (await session.step(1)).position == position + 1


async def test_marks_outlive_the_server_and_a_rollback_begins_anew(replica: Replica, client: AsyncClient) -> None:
    session = await client.open_session(MODEL, id="marked", durability="periodic")
    await session.step([1, 2, 3])
    assert await session.checkpoint("three") == 3
    await session.step([4, 5])
    await crash(replica)
    await session.step(6)
    (listed,) = await client.sessions()
    assert (dict(listed.checkpoints), listed.durability) == ({"three": 3}, "periodic")
    epoch = session.epoch
    await session.rollback("three")
    assert session.position == 3
    assert session.epoch > epoch
    await check(session, [1, 2, 3], oracle_of(replica))
    with pytest.raises(CheckpointNotFound):
        await session.rollback("four")
    await crash(replica)
    await check(session, [1, 2, 3, 3], oracle_of(replica))
    await session.reset()
    await session.step([7, 8])
    await crash(replica)
    await check(session, [7, 8], oracle_of(replica))


async def test_opens_forks_and_closes_go_on_over_a_crash(replica: Replica, client: AsyncClient) -> None:
    for number in range(3):
        opening = asyncio.create_task(client.open_sessions(MODEL, 200))
        await asyncio.sleep(0.01 * number)
        await crash(replica)
        sessions = await opening
        assert all(session.created for session in sessions)
        forking = asyncio.gather(*(session.fork() for session in sessions[:20]))
        await crash(replica)
        forks = await forking
        assert (await client.step_many([*sessions, *forks], [1] * 220)).positions.tolist() == [1] * 220
        closing = asyncio.gather(*(session.close() for session in [*sessions, *forks]))
        await asyncio.sleep(0)
        await crash(replica)
        await closing
        assert await client.sessions() == []


async def test_what_was_left_in_order_is_found_by_the_next_client(replica: Replica, client: AsyncClient) -> None:
    session = await client.open_session(MODEL, id="left", durability="periodic")
    consumed: list[int] = []
    await follow(session, consumed, 20, np.random.default_rng(3))
    await session.detach()
    await crash(replica)
    async with AsyncClient(replica.server.target) as other:
        found = await other.open_session(MODEL, id="left", mode="attach")
        assert (found.position, found.durable_position) == (len(consumed), len(consumed))
        await check(found, consumed, oracle_of(replica))


async def test_sessions_move_between_the_servers_of_one_store(start_replica: StartReplica, redis_url: str) -> None:
    replicas = [start_replica(store=redis_url) for _ in range(3)]
    async with AsyncClient([replica.server.target for replica in replicas], timeout_seconds=60) as client:
        sessions = await client.open_sessions(MODEL, 60)
        consumed: list[list[int]] = [[] for _ in sessions]

        async def step_all(number: int, seed: int) -> None:
            await asyncio.gather(
                *(
                    follow(session, tokens, number, np.random.default_rng([seed, index]))
                    for index, (session, tokens) in enumerate(zip(sessions, consumed, strict=True))
                )
            )

        await step_all(5, 0)
        for number, replica in enumerate(replicas):
            stepping = asyncio.create_task(step_all(60, number + 1))
            await asyncio.sleep(0.05)
            if number == 1:
                await asyncio.to_thread(replica.stop)
            else:
                await asyncio.to_thread(replica.kill)
            await stepping
            await step_all(5, number + 10)
            await asyncio.to_thread(replica.start)
            await step_all(20, number + 20)
        await asyncio.gather(
            *(
                check(session, tokens, oracle_of(replicas[0]))
                for session, tokens in zip(sessions, consumed, strict=True)
            )
        )
        assert len(await client.sessions()) == len(sessions)
