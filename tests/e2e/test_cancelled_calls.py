"""Calls on a session that are cancelled at any of their awaits: each has taken effect wholly or not at all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import CheckpointNotFound
from tests.support.followed import (
    MAX_RUN_TOKENS,
    FollowedSession,
    assert_nothing_is_left,
    consuming,
    nothing,
    other_tasks,
    until_open,
)
from tests.support.interrupting import interruptions, prepared
from tests.support.server import ServerProcess

LONG = [number % 11 for number in range(300)]


@pytest.fixture
async def client(storing_server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(storing_server.target) as client:
        yield client


@pytest.fixture
async def other(storing_server: ServerProcess) -> AsyncIterator[AsyncClient]:
    """The client of the references."""
    async with AsyncClient(storing_server.target) as client:
        yield client


@pytest.fixture(params=["none", "periodic"])
async def followed(
    request: pytest.FixtureRequest, client: AsyncClient, other: AsyncClient, storing_server: ServerProcess
) -> AsyncIterator[FollowedSession]:
    """A session of each durability; nothing is left of the calls on it."""
    followed = await FollowedSession.open(client, other, durability=request.param)
    tasks = other_tasks()
    yield followed
    await assert_nothing_is_left(client, storing_server, [followed.session])
    await until_open(other, {followed.session.id, followed.reference.id})
    assert other_tasks() <= tasks
    await followed.close()
    await until_open(other, set())


async def test_a_cancelled_step_of_one_token_has_run_or_not(followed: FollowedSession) -> None:
    session = followed.session
    position = session.position
    async for interrupted in interruptions(prepared(lambda: session.step(9, states=True))):
        await followed.check_whole(interrupted, position, position + 1, consuming([9]))
        position = session.position


async def test_a_cancelled_long_step_has_run_up_to_the_end_of_a_run(followed: FollowedSession) -> None:
    session = followed.session
    async for interrupted in interruptions(prepared(lambda: session.step(LONG, states=True))):
        position = followed.reference.position
        ends = [0, MAX_RUN_TOKENS, 2 * MAX_RUN_TOKENS, 300]
        if interrupted.is_finished:
            assert interrupted.result.position == position + 300
            ends = ends[-1:]
        await followed.check({position + end: consuming(LONG[:end]) if end else nothing for end in ends})


async def test_steps_behind_a_cancelled_one_run_or_are_refused_as_gaps(followed: FollowedSession) -> None:
    session = followed.session

    async def several() -> None:
        await asyncio.gather(session.step(1), session.step([2, 3]), session.step(4))

    async for interrupted in interruptions(prepared(several)):
        position = followed.reference.position
        ends = [4] if interrupted.is_finished else [0, 1, 3, 4]
        await followed.check({position + end: consuming([1, 2, 3, 4][:end]) if end else nothing for end in ends})


async def test_a_cancelled_step_many_has_run_or_not_for_each_session(
    client: AsyncClient, other: AsyncClient, followed: FollowedSession
) -> None:
    many = [followed, *[await FollowedSession.open(client, other) for _ in range(4)]]
    sessions, counts = [one.session for one in many], [1, 2, 128, 300, 5]
    tokens = [LONG[:count] for count in counts]

    def step() -> Coroutine[Any, Any, Any]:
        return client.step_many(sessions, np.concatenate(tokens), counts, states=True)

    async for interrupted in interruptions(prepared(step), num_turns=6):
        for one, own in zip(many, tokens, strict=True):
            position = one.reference.position
            ends = [len(own)] if interrupted.is_finished else sorted({0, len(own), *range(0, len(own), MAX_RUN_TOKENS)})
            await one.check({position + end: consuming(own[:end]) if end else nothing for end in ends})
    for one in many[1:]:
        await one.close()


async def test_a_cancelled_reset_has_set_back_the_session_or_not(followed: FollowedSession) -> None:
    async for interrupted in interruptions(prepared(followed.session.reset)):
        await followed.check_whole(interrupted, followed.reference.position, 0, AsyncSession.reset)


async def test_a_cancelled_rollback_has_set_back_the_session_or_not(followed: FollowedSession) -> None:
    async for interrupted in interruptions(prepared(lambda: followed.session.rollback("marked"))):
        await followed.check_whole(
            interrupted, followed.reference.position, 2, lambda reference: reference.rollback("marked")
        )


async def test_a_cancelled_import_has_replaced_the_state_or_not(followed: FollowedSession) -> None:
    await followed.check({4: nothing})
    state = await followed.session.export_state()
    await followed.check({7: nothing})
    async for interrupted in interruptions(prepared(lambda: followed.session.import_state(state))):
        await followed.check_whole(
            interrupted, followed.reference.position, 7, lambda reference: reference.import_state(state)
        )


async def test_a_cancelled_export_changes_nothing(followed: FollowedSession) -> None:
    async for interrupted in interruptions(prepared(followed.session.export_state)):
        if interrupted.is_finished:
            assert interrupted.result == await followed.reference.export_state()
        await followed.check({followed.reference.position: nothing})


async def test_a_cancelled_checkpoint_has_marked_the_state_of_its_time_or_nothing(followed: FollowedSession) -> None:
    session, reference = followed.session, followed.reference
    number = 0

    async def prepare() -> Callable[[], Any]:
        nonlocal number
        number += 1
        await reference.checkpoint("new")
        return lambda: session.checkpoint(f"new-{number}")

    async for interrupted in interruptions(prepare):
        await followed.check({reference.position: nothing})
        try:
            await session.rollback(f"new-{number}")
        except CheckpointNotFound:
            assert not interrupted.is_finished
            continue
        assert interrupted.was_begun
        await reference.rollback("new")
        await followed.check({reference.position: nothing})


async def test_a_cancelled_fork_leaves_no_session(other: AsyncClient, followed: FollowedSession) -> None:
    session, reference = followed.session, followed.reference
    async for interrupted in interruptions(prepared(session.fork)):
        if interrupted.is_finished:
            forks = FollowedSession(interrupted.result, await reference.fork())
            await forks.check({reference.position: nothing})
            await forks.close()
        await followed.check({reference.position: nothing})
        await until_open(other, {session.id, reference.id})


async def test_a_generate_that_is_broken_off_has_consumed_what_it_sampled(followed: FollowedSession) -> None:
    session, reference = followed.session, followed.reference
    received: list[int] = []
    seed = 0

    async def generate() -> list[int]:
        async for token in session.generate(100, seed=seed):
            received.append(token)
        return received

    async def prepare() -> Callable[[], Any]:
        nonlocal seed
        seed += 1
        received.clear()
        return generate

    def sampling(count: int) -> Callable[[AsyncSession], Awaitable[object]]:
        async def sample(reference: AsyncSession) -> None:
            sampled = [token async for token in reference.generate(count, seed=seed)]
            assert sampled[: len(received)] == received

        return sample

    async for interrupted in interruptions(prepare):
        position = reference.position
        fewest = 100 if interrupted.is_finished else len(received)
        await followed.check({position + count: sampling(count) if count else nothing for count in range(fewest, 101)})
