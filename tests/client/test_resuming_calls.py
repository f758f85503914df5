"""Opening, closing and everything else that is one call: repeated until it is answered, and done once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

import grpc
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import (
    AccessDenied,
    CheckpointNotFound,
    Draining,
    SessionExists,
    SessionMoved,
    SessionNotFound,
    TimedOut,
    Unavailable,
)
from cellserve.v1.values_pb2 import SessionState
from tests.client.scripted_calls import MODEL
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_sessions import digests

UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    yield server
    await server.stop()
    assert server.mistakes == []


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout_seconds=20) as client:
        yield client


@pytest.fixture
async def session(client: AsyncClient) -> AsyncSession:
    session = await client.open_session(MODEL, id="followed")
    await session.step([1, 2, 3])
    return session


def consumed(server: ScriptedServer, session_id: str = "followed") -> list[int]:
    return server.sessions.resident[session_id].row.tokens


def state_of(*tokens: int) -> bytes:
    return SessionState(format=1, position=len(tokens), values=bytes(tokens)).SerializeToString()


async def reset(session: AsyncSession) -> None:
    await session.reset()
    assert session.position == 0


async def import_state(session: AsyncSession) -> None:
    await session.import_state(state_of(7, 8))
    assert session.position == 2


async def export_state(session: AsyncSession) -> None:
    assert await session.export_state() == state_of(1, 2, 3)


async def checkpoint(session: AsyncSession) -> None:
    assert await session.checkpoint("here") == 3


async def rollback(session: AsyncSession) -> None:
    await session.checkpoint("there")
    await session.step([4, 5])
    await session.rollback("there")
    assert session.position == 3


async def fork(session: AsyncSession) -> None:
    forked = await session.fork()
    assert forked.position == 3
    assert (await forked.step(9)).next_token.tolist() == digests([1, 2, 3, 9], 3)  # type: ignore[union-attr]


CALLS: dict[str, tuple[Callable[[AsyncSession], Coroutine[None, None, None]], list[int]]] = {
    "ResetSession": (reset, []),
    "ImportSession": (import_state, [7, 8]),
    "ExportSession": (export_state, [1, 2, 3]),
    "CheckpointSession": (checkpoint, [1, 2, 3]),
    "RollbackSession": (rollback, [1, 2, 3]),
    "ForkSession": (fork, [1, 2, 3]),
}


@pytest.mark.parametrize("breaks_after", [False, True])
@pytest.mark.parametrize("code", [UNAVAILABLE, INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_that_breaks_is_made_again_and_takes_effect_once(
    server: ScriptedServer, session: AsyncSession, name: str, code: grpc.StatusCode, breaks_after: bool
) -> None:
    call, expected = CALLS[name]
    server.break_at += [(f"after {name}" if breaks_after else name, code)] * 2
    await call(session)
    assert server.break_at == []
    assert server.seen.count(name) == 3
    assert consumed(server) == expected
    result = await session.step([11, 12])
    assert result.position == len(expected) + 2
    assert consumed(server) == [*expected, 11, 12]


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_meets_a_session_that_is_whole(server: ScriptedServer, client: AsyncClient, name: str) -> None:
    session = await client.open_session(MODEL, id="followed")
    server.persist()
    await session.step([1, 2, 3])
    await server.restart()  # with a state of no tokens
    call, expected = CALLS[name]
    await call(session)
    assert consumed(server) == expected
    assert (await session.step(4)).position == len(expected) + 1


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_waits_for_the_server_to_come_back(
    server: ScriptedServer, session: AsyncSession, name: str
) -> None:
    call, expected = CALLS[name]
    await server.kill()
    calling = asyncio.create_task(call(session))
    await asyncio.sleep(0.2)
    await server.start()
    await calling
    assert consumed(server) == expected


async def test_after_a_reset_the_server_may_die_and_nothing_of_before_comes_back(
    server: ScriptedServer, session: AsyncSession
) -> None:
    await session.reset()
    await session.step([4, 5])
    await server.restart()
    await session.step([6])
    assert consumed(server) == [4, 5, 6]


async def test_a_name_that_is_no_checkpoint_leaves_a_session_that_just_works(
    server: ScriptedServer, session: AsyncSession
) -> None:
    with pytest.raises(CheckpointNotFound):
        await session.rollback("nothing")
    assert (await session.step(4)).position == 4


async def test_models_and_sessions_are_asked_for_again(server: ScriptedServer, client: AsyncClient) -> None:
    session = await client.open_session(MODEL, id="followed", keep=False)
    await session.step(1)
    await session.checkpoint("here")
    server.break_at += [("ListModels", UNAVAILABLE), ("ListSessions", INTERNAL), ("after ListSessions", UNAVAILABLE)]
    assert [model.name for model in await client.models()] == [MODEL]
    (listed,) = await client.sessions()
    assert (listed.id, dict(listed.checkpoints), listed.generating) == ("followed", {"here": 1}, False)
    assert server.break_at == []


async def test_a_call_that_no_server_answers_until_its_timeout_says_why(
    server: ScriptedServer, client: AsyncClient, session: AsyncSession
) -> None:
    await server.kill()
    for call in (
        client.models(timeout_seconds=0.1),
        client.sessions(timeout_seconds=0.1),
        session.fork(timeout_seconds=0.1),
        session.reset(timeout_seconds=0.1),
        session.checkpoint("a", timeout_seconds=0.1),
        client.open_session(MODEL, timeout_seconds=0.5),
    ):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable):
        await client.ping()
    await server.start()
    assert (await session.step(4)).position == 4


async def test_what_a_repeat_cannot_mend_is_raised_at_once(server: ScriptedServer, client: AsyncClient) -> None:
    server.break_at.append(("ListModels", grpc.StatusCode.UNAUTHENTICATED))
    with pytest.raises(AccessDenied):
        await client.models()
    server.break_at.append(("ListModels", grpc.StatusCode.DEADLINE_EXCEEDED))
    with pytest.raises(TimedOut):
        await client.models(timeout_seconds=5)


@pytest.mark.parametrize("point", ["open", "after open"])
@pytest.mark.parametrize("mode", ["create", "attach_or_create", None])
async def test_an_open_that_breaks_is_made_again_and_creates_one_session(
    server: ScriptedServer, client: AsyncClient, point: str, mode: str | None
) -> None:
    server.break_at += [(point, INTERNAL), (point, INTERNAL)]
    if mode is None:
        session = await client.open_session(MODEL)
    else:
        session = await client.open_session(MODEL, id="named", mode=mode)  # type: ignore[arg-type]
    assert server.break_at == []
    assert session.created
    assert list(server.sessions.resident) == [session.id]
    assert (await session.step(1)).position == 1


async def test_an_open_that_breaks_tells_a_session_that_was_there_from_one_of_its_own(
    server: ScriptedServer, client: AsyncClient, session: AsyncSession
) -> None:
    async with AsyncClient(server.target) as other:
        server.break_at.append(("open", INTERNAL))
        with pytest.raises(SessionExists):
            await other.open_session(MODEL, id="followed", mode="create")
        server.break_at.append(("after open", INTERNAL))
        taken = await other.open_session(MODEL, id="followed")
        assert (taken.created, taken.position) == (False, 3)
        with pytest.raises(SessionMoved):
            await session.step(4)
        server.break_at.append(("open", INTERNAL))
        with pytest.raises(SessionNotFound):
            await other.open_session(MODEL, id="never-was", mode="attach")


async def test_many_opens_that_break_open_all(server: ScriptedServer, client: AsyncClient) -> None:
    server.break_at += [("after open", INTERNAL), ("open", INTERNAL)]
    sessions = await client.open_sessions(MODEL, 40)
    assert len({session.id for session in sessions}) == len(server.sessions.resident) == 40
    assert all(session.created for session in sessions)
    positions = (await client.step_many(sessions, [1] * 40)).positions
    assert positions.tolist() == [1] * 40


async def test_an_open_waits_while_the_server_drains_and_says_so_in_the_end(
    server: ScriptedServer, client: AsyncClient
) -> None:
    await client.open_session(MODEL)
    server.drain()
    with pytest.raises(Draining):
        await client.open_session(MODEL, timeout_seconds=1)
    opening = asyncio.create_task(client.open_session(MODEL))
    await asyncio.sleep(0.05)
    await server.restart()
    assert (await opening).created


@pytest.mark.parametrize("point", ["close", "after close"])
async def test_a_close_that_breaks_is_made_again(server: ScriptedServer, session: AsyncSession, point: str) -> None:
    server.break_at.append((point, INTERNAL))
    await session.close()
    assert server.break_at == []
    assert server.sessions.resident == {}
    assert server.store.ended == {"followed": "SESSION_CLOSED"}


async def test_a_close_during_an_outage_waits_and_needs_no_replay(
    server: ScriptedServer, session: AsyncSession
) -> None:
    await server.kill()
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0.1)
    await server.start()
    await closing
    assert server.sessions.runs == []
    assert server.store.ended == {"followed": "SESSION_CLOSED"}


async def test_a_close_comes_after_the_steps_asked_for_before_whatever_breaks(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.break_at += [("run", INTERNAL)]
    steps = [asyncio.create_task(session.step(token)) for token in (4, 5)]
    await asyncio.sleep(0)
    await session.close()
    assert [(await step).position for step in steps] == [4, 5]
    assert server.store.ended == {"followed": "SESSION_CLOSED"}


async def test_a_close_never_ends_a_session_that_somebody_else_took(
    server: ScriptedServer, session: AsyncSession
) -> None:
    server.break_streams()
    async with AsyncClient(server.target) as other:
        taken = await other.open_session(MODEL, id="followed")
        await session.close()
        assert (await taken.step(4)).position == 4


async def test_detaching_waits_until_the_state_is_stored(server: ScriptedServer, session: AsyncSession) -> None:
    assert server.store.rows["followed"].tokens == []
    await session.detach()
    assert server.store.rows["followed"].tokens == [1, 2, 3]
    assert server.sessions.resident["followed"].row.held == []  # all answers have come


async def test_detaching_gives_a_server_that_died_what_it_lost(server: ScriptedServer, session: AsyncSession) -> None:
    await server.restart()
    await session.detach()
    assert server.store.rows["followed"].tokens == [1, 2, 3]


@pytest.mark.parametrize("point", ["detach", "after detach"])
async def test_detaching_raises_nothing(server: ScriptedServer, session: AsyncSession, point: str) -> None:
    server.break_at.append((point, INTERNAL))
    await session.detach(timeout_seconds=1)
    assert server.break_at == []
