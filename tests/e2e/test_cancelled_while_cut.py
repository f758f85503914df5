"""Calls that are cancelled while their connection is cut: sessions go on with what has taken effect, once each."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import CheckpointNotFound
from tests.chaos.proxy import BadProxy
from tests.support.followed import (
    MAX_RUN_TOKENS,
    FollowedSession,
    Outcomes,
    assert_nothing_is_left,
    consuming,
    nothing,
    until_open,
)
from tests.support.replicas import MODEL
from tests.support.server import ServerProcess

LONG = [number % 11 for number in range(300)]
NUM_CUTS = 5

DurabilityName: TypeAlias = Literal["none", "periodic"]


@pytest.fixture
async def other(storing_server: ServerProcess) -> AsyncIterator[AsyncClient]:
    """The client of the references, whose connection nobody cuts."""
    async with AsyncClient(storing_server.target) as client:
        yield client
        await until_open(client, set())


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def step_behind(session: AsyncSession) -> None:
    await asyncio.gather(session.step(1), session.step([2, 3]))


async def sample(session: AsyncSession) -> None:
    async for _ in session.generate(100, seed=5):
        pass


def sampling(count: int) -> Callable[[AsyncSession], Awaitable[object]]:
    async def sampled(reference: AsyncSession) -> None:
        async for _ in reference.generate(count, seed=5):
            pass

    return sampled


def runs(tokens: list[int], ends: list[int]) -> Callable[[int], Outcomes]:
    return lambda position: {position + end: consuming(tokens[:end]) if end else nothing for end in ends}


CALLS: dict[str, tuple[Callable[[AsyncSession], Awaitable[Any]], Callable[[int], Outcomes]]] = {
    "step": (lambda session: session.step(9), runs([9], [0, 1])),
    "steps": (step_behind, runs([1, 2, 3], [0, 1, 3])),
    "long": (
        lambda session: session.step(LONG, states=True),
        runs(LONG, [0, MAX_RUN_TOKENS, 2 * MAX_RUN_TOKENS, 300]),
    ),
    "reset": (lambda session: session.reset(), lambda position: {position: nothing, 0: AsyncSession.reset}),
    "rollback": (
        lambda session: session.rollback("marked"),
        lambda position: {position: nothing, 2: lambda reference: reference.rollback("marked")},
    ),
    "export": (lambda session: session.export_state(), lambda position: {position: nothing}),
    "generate": (
        sample,
        lambda position: {position + count: sampling(count) if count else nothing for count in range(101)},
    ),
}


async def cancel_while_cut(proxy: BadProxy, call: Awaitable[Any], random: np.random.Generator) -> bool:
    """Cuts every connection at some moment of the call, and cancels it at another; whether it has finished."""
    task = asyncio.ensure_future(call)
    await turns(int(random.integers(0, 60)))
    proxy.cut()
    await turns(int(random.integers(0, 60)))
    if random.random() < 0.3:
        await asyncio.sleep(float(random.uniform(0, 0.2)))  # by then it is on its way again
    task.cancel()
    await asyncio.wait([task], timeout=1.0)
    assert task.done()
    return not task.cancelled()


@pytest.mark.parametrize("durability", ["none", "periodic"])
async def test_sessions_go_on_whatever_is_cancelled_while_the_connection_is_cut(
    storing_server: ServerProcess, other: AsyncClient, durability: DurabilityName
) -> None:
    outcomes: set[bool] = set()

    async def follow(number: int, name: str) -> None:
        random = np.random.default_rng([number, durability == "none"])
        make, legal = CALLS[name]
        async with BadProxy(storing_server.port, seed=0, mischief=0.0) as proxy, AsyncClient(proxy.target) as client:
            followed = await FollowedSession.open(client, other, durability=durability)
            for _ in range(NUM_CUTS):
                position = followed.session.position
                is_finished = await cancel_while_cut(proxy, make(followed.session), random)
                outcomes.add(is_finished)
                await followed.check(legal(position))
            await assert_nothing_is_left(client, storing_server, [followed.session])
            await followed.close()

    await asyncio.gather(*(follow(number, name) for number, name in enumerate(CALLS)))
    assert outcomes == {False, True}


@pytest.mark.parametrize("durability", ["none", "periodic"])
async def test_no_session_is_left_of_opens_forks_and_closes_cancelled_while_the_connection_is_cut(
    storing_server: ServerProcess, other: AsyncClient, durability: DurabilityName
) -> None:
    async def follow(number: int) -> None:
        random = np.random.default_rng([number, 7])
        async with BadProxy(storing_server.port, seed=0, mischief=0.0) as proxy, AsyncClient(proxy.target) as client:
            followed = await FollowedSession.open(client, other, durability=durability)
            for _ in range(NUM_CUTS):
                await cancel_while_cut(proxy, client.open_sessions(MODEL, 3, durability=durability), random)
                await cancel_while_cut(proxy, followed.session.fork(), random)
                await cancel_while_cut(proxy, followed.session.checkpoint("new"), random)
                await followed.check({followed.reference.position: nothing})
            with contextlib.suppress(CheckpointNotFound):
                await followed.session.rollback("new")
            await cancel_while_cut(proxy, followed.session.close(), random)
            await followed.reference.close()

    await asyncio.gather(*(follow(number) for number in range(4)))
    await until_open(other, set())
