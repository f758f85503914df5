"""Opening and leaving sessions, cancelled at any await: none stays open that nobody knows of, and none is lost."""

from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import ClosedError
from tests.support.followed import FollowedSession, assert_nothing_is_left, nothing, other_tasks, until_open
from tests.support.interrupting import interruptions, prepared
from tests.support.replicas import MODEL
from tests.support.server import ServerProcess


@pytest.fixture
async def other(storing_server: ServerProcess) -> AsyncIterator[AsyncClient]:
    """The client of the references; at the end nothing is open on the server."""
    async with AsyncClient(storing_server.target) as client:
        async with client.session(MODEL):
            pass  # its stream has begun
        yield client
        await until_open(client, set())


@pytest.fixture
async def client(storing_server: ServerProcess, other: AsyncClient) -> AsyncIterator[AsyncClient]:
    """The client whose calls are cancelled; nothing is left of them."""
    async with AsyncClient(storing_server.target) as client:
        async with client.session(MODEL):
            tasks = other_tasks()
        yield client
        await assert_nothing_is_left(client, storing_server, [])
        assert other_tasks() <= tasks


async def test_a_new_session_whose_first_open_is_cancelled_is_closed(
    storing_server: ServerProcess, other: AsyncClient
) -> None:
    client = AsyncClient(storing_server.target)

    async def prepare() -> Callable[[], Any]:
        nonlocal client
        await client.close()
        client = AsyncClient(storing_server.target)  # finds the server and its model anew
        return lambda: client.open_session(MODEL)

    tasks = other_tasks()
    async for interrupted in interruptions(prepare):
        if interrupted.is_finished:
            assert (await interrupted.result.step(1)).position == 1
            await interrupted.result.close()
        await until_open(other, set())
        async with client.session(MODEL) as session:
            assert (await session.step(1)).position == 1
    await client.close()
    assert other_tasks() <= tasks


async def test_new_sessions_whose_open_is_cancelled_are_all_closed(client: AsyncClient, other: AsyncClient) -> None:
    async for interrupted in interruptions(prepared(lambda: client.open_sessions(MODEL, 20))):
        if interrupted.is_finished:
            sessions = interrupted.result
            assert (await client.step_many(sessions, [1] * 20)).positions.tolist() == [1] * 20
            for session in sessions:
                await session.close()
        await until_open(other, set())


async def test_sessions_by_id_whose_open_is_cancelled_can_be_opened_again(
    client: AsyncClient, other: AsyncClient
) -> None:
    numbers = count()
    ids: list[str] = []

    async def prepare() -> Callable[[], Any]:
        number = next(numbers)
        ids[:] = [f"named-{number}-{index}" for index in range(5)]
        return lambda: client.open_sessions(MODEL, tuple(ids))

    async for interrupted in interruptions(prepare):
        sessions = interrupted.result if interrupted.is_finished else await client.open_sessions(MODEL, ids)
        assert [session.id for session in sessions] == ids
        assert (await client.step_many(sessions, [1] * 5)).positions.tolist() == [1] * 5
        await until_open(other, set(ids))
        for session in sessions:
            await session.close()


@pytest.mark.parametrize("durability", ["none", "periodic"])
@pytest.mark.parametrize("is_left", [False, True])
async def test_a_session_whose_attach_is_cancelled_is_as_it_was(
    client: AsyncClient, other: AsyncClient, durability: str, is_left: bool
) -> None:
    followed = await FollowedSession.open(client, other, id="attached", durability=durability)

    def attach() -> Any:
        return client.open_session(MODEL, id="attached", mode="attach")

    async def prepare() -> Callable[[], Any]:
        if is_left:
            await followed.session.detach()
        return attach

    async for interrupted in interruptions(prepare):
        left = followed.session
        followed.session = interrupted.result if interrupted.is_finished else await attach()
        assert not followed.session.created
        await left.detach()  # it is the session's no more
        await followed.check({followed.reference.position: nothing})
    del left
    await followed.close()


@pytest.mark.parametrize("durability", ["none", "periodic"])
async def test_a_session_whose_detach_is_cancelled_is_found_again(
    client: AsyncClient, other: AsyncClient, durability: str
) -> None:
    followed = await FollowedSession.open(client, other, id="detached", durability=durability)

    async for interrupted in interruptions(prepared(lambda: followed.session.detach())):
        if interrupted.was_begun:
            with pytest.raises(ClosedError):
                await followed.session.step(1)
            followed.session = await client.open_session(MODEL, id="detached", mode="attach")
        await followed.check({followed.reference.position: nothing})
    await followed.close()


async def test_a_session_whose_close_is_cancelled_is_closed_if_that_has_begun(
    client: AsyncClient, other: AsyncClient
) -> None:
    session: AsyncSession

    async def prepare() -> Callable[[], Any]:
        nonlocal session
        session = await client.open_session(MODEL)
        await session.step([1, 2])
        return session.close

    async for interrupted in interruptions(prepare):
        if interrupted.was_begun:
            with pytest.raises(ClosedError):
                await session.step(1)
        else:
            assert (await session.step(3)).position == 3
            await session.close()
        await until_open(other, set())


async def test_a_client_whose_close_is_cancelled_is_closed_all_the_same(
    storing_server: ServerProcess, other: AsyncClient
) -> None:
    client: AsyncClient

    async def prepare() -> Callable[[], Any]:
        nonlocal client
        client = AsyncClient(storing_server.target)
        await (await client.open_session(MODEL)).step(1)
        return client.close

    tasks = other_tasks()
    async for _ in interruptions(prepare):
        await client.close()
        with pytest.raises(ClosedError):
            await client.ping()
        await until_open(other, set())
        assert other_tasks() <= tasks
