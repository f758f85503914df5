"""Whatever happens to streams and servers, who calls `step` notices nothing but time."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession, Client, StepResult
from cellserve.errors import (
    AccessDenied,
    ConnectionLost,
    PositionGap,
    SessionClosed,
    SessionMoved,
    SessionNotFound,
    StaleHandle,
    StepManyFailed,
    StoreUnavailable,
    TimedOut,
    TokensLost,
)
from tests.client.scripted_calls import MODEL
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_sessions import digests

BREAKS = [
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OK,
]
INTERNAL = grpc.StatusCode.INTERNAL


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


class Follower:
    """A session and the tokens that it should have consumed."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.tokens: list[int] = []

    async def step(self, *tokens: int, timeout_seconds: float | None = None) -> StepResult:
        self.tokens += tokens
        expected = digests(self.tokens, len(self.tokens) - len(tokens))
        result = await self.session.step(list(tokens), timeout_seconds=timeout_seconds)
        assert result.next_token is not None
        assert result.next_token.tolist() == expected
        return result


@pytest.fixture
async def follower(client: AsyncClient) -> Follower:
    return Follower(await client.open_session(MODEL, id="followed"))


def consumed(server: ScriptedServer, session_id: str = "followed") -> list[int]:
    return server.sessions.resident[session_id].row.tokens


@pytest.mark.parametrize("code", BREAKS, ids=lambda code: str(code.name))
@pytest.mark.parametrize("point", ["run", "after run"])
async def test_a_stream_that_breaks_around_a_run_costs_nothing_but_time(
    server: ScriptedServer, follower: Follower, point: str, code: grpc.StatusCode
) -> None:
    await follower.step(1, 2, 3)
    server.break_at.append((point, code))
    assert (await follower.step(4, 5)).position == 5
    assert (await follower.step(6)).position == 6
    assert server.break_at == []
    assert consumed(server) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("point", ["open", "after open"])
async def test_a_stream_that_breaks_while_the_session_is_attached_again_is_tried_again(
    server: ScriptedServer, follower: Follower, point: str
) -> None:
    await follower.step(1)
    server.break_at += [("run", INTERNAL), (point, INTERNAL), (point, INTERNAL)]
    await follower.step(2)
    assert server.break_at == []
    assert consumed(server) == [1, 2]


async def test_an_idle_session_is_attached_again_by_its_next_step(server: ScriptedServer, follower: Follower) -> None:
    await follower.step(1)
    server.break_streams()
    await asyncio.sleep(0.05)
    num_opens = server.seen.count("open")
    assert num_opens == 1
    await follower.step(2)
    assert server.seen.count("open") == 2


async def test_many_runs_on_their_way_are_all_answered_in_order(server: ScriptedServer, client: AsyncClient) -> None:
    session = await client.open_session(MODEL, id="followed")
    server.break_at += [("after run", INTERNAL), ("run", INTERNAL)]
    results = await asyncio.gather(*(session.step([number, number + 1]) for number in range(20)))
    assert [result.position for result in results] == list(range(2, 41, 2))
    expected = [token for number in range(20) for token in (number, number + 1)]
    assert consumed(server) == expected
    rows = [result.next_token for result in results]
    assert [token for row in rows if row is not None for token in row.tolist()] == digests(expected)


async def test_steps_longer_than_a_run_go_on_in_the_middle(server: ScriptedServer, follower: Follower) -> None:
    server.break_at += [("run", INTERNAL), ("after run", INTERNAL), ("after run", INTERNAL)]
    await follower.step(*range(1000))
    assert consumed(server) == list(range(1000))


async def test_a_server_that_died_gets_the_tokens_that_it_lost(server: ScriptedServer, follower: Follower) -> None:
    await follower.step(1, 2, 3)
    server.persist()
    for token in range(4, 10):
        await follower.step(token)
    await server.restart()
    assert (await follower.step(10)).position == 10
    assert consumed(server) == list(range(1, 11))
    # What was safe before has not run again.
    assert server.sessions.runs == [("followed", 3, [4, 5, 6, 7, 8, 9]), ("followed", 9, [10])]


async def test_a_server_that_dies_again_and_again_loses_nothing(server: ScriptedServer, follower: Follower) -> None:
    for number in range(30):
        if number % 5 == 2:
            server.persist()
        if number % 3 == 1:
            server.break_at.append(("after run" if number % 2 else "run", INTERNAL))
        step = asyncio.create_task(follower.step(*range(number, number + 1 + number % 3)))
        if number % 4 == 3:
            await asyncio.sleep(0.001 * (number % 7))
            await server.restart()
        await step
    assert consumed(server) == follower.tokens


async def test_a_run_whose_answer_died_with_the_server_runs_once_more_after_what_it_needs(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.may_run.clear()
    steps = [asyncio.create_task(follower.step(token)) for token in (2, 3, 4)]
    await asyncio.sleep(0.05)
    await server.restart()
    server.may_run.set()
    await asyncio.gather(*steps)
    assert consumed(server) == [1, 2, 3, 4]


async def test_sync_durability_is_asked_for_the_answer_that_was_swallowed(
    server: ScriptedServer, client: AsyncClient
) -> None:
    follower = Follower(await client.open_session(MODEL, id="followed", durability="sync"))
    assert follower.session.durability == "sync"
    await follower.step(1)
    server.break_at.append(("after run", INTERNAL))
    step = asyncio.create_task(follower.step(2, 3))
    while server.break_at:
        await asyncio.sleep(0)
    await server.restart()
    await step
    assert server.sessions.runs == []  # the answer came out of the store
    assert consumed(server) == [1, 2, 3]


async def test_a_session_without_durability_is_gone_with_its_server(
    server: ScriptedServer, client: AsyncClient
) -> None:
    session = await client.open_session(MODEL, durability="none")
    await session.step(1)
    server.break_streams()
    assert (await session.step(2)).position == 2
    await server.restart()
    with pytest.raises(SessionNotFound):
        await session.step(3)


async def test_a_session_that_lacks_tokens_which_nobody_has_says_so_and_stays_lost(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1, 2, 3, 4)
    server.persist()
    while follower.session.durable_position != 4:
        await asyncio.sleep(0)
    server.store.rows["followed"].tokens = [1, 2]  # an older backup of the store, say
    await server.restart()
    for _ in range(2):
        with pytest.raises(TokensLost) as lost:
            await follower.session.step(5)
        assert lost.value.session_id == "followed"


@pytest.mark.parametrize("reason", ["STORE_UNAVAILABLE", "DRAINING"])
@pytest.mark.parametrize("point", ["run", "open"])
async def test_what_a_server_cannot_do_for_a_while_waits(
    server: ScriptedServer, follower: Follower, point: str, reason: str
) -> None:
    await follower.step(1)
    server.refuse += [(point, reason)] * 3
    server.break_at.append(("run", INTERNAL))
    steps = [asyncio.create_task(follower.step(token)) for token in (2, 3)]
    await asyncio.gather(*steps)
    assert server.refuse == []
    assert consumed(server) == [1, 2, 3]


async def test_no_connection_until_the_timeout_is_a_lost_connection_and_the_repeat_runs_nothing_twice(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.persist()
    server.break_at.append(("after run", INTERNAL))
    step = asyncio.create_task(follower.session.step([2, 3], timeout_seconds=0.3))
    while server.break_at:
        await asyncio.sleep(0)
    server.sessions.save(server.sessions.resident["followed"])
    await server.kill()
    with pytest.raises(ConnectionLost) as lost:
        await step
    assert lost.value.in_doubt
    with pytest.raises(ConnectionLost) as unsent:
        await follower.session.step([2, 3], timeout_seconds=0.1)
    assert not unsent.value.in_doubt
    await server.start()
    await follower.step(2, 3)
    assert server.sessions.runs == []
    await follower.step(4)
    assert consumed(server) == [1, 2, 3, 4]


async def test_a_store_that_is_away_until_the_timeout_is_what_the_step_raises(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.refuse += [("run", "STORE_UNAVAILABLE")] * 1 + [("open", "STORE_UNAVAILABLE")] * 1000
    with pytest.raises(StoreUnavailable):
        await follower.session.step(2, timeout_seconds=0.2)
    server.refuse.clear()
    await follower.step(2)
    assert consumed(server) == [1, 2]


async def test_a_step_that_a_living_server_does_not_answer_times_out(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.may_run.clear()
    with pytest.raises(TimedOut):
        await follower.session.step(2, timeout_seconds=0.1)
    server.may_run.set()
    result = await follower.session.step(3)
    assert result.position == 3  # the scripted server does not withdraw
    assert consumed(server) == [1, 2, 3]


@pytest.mark.parametrize("has_run", [False, True])
async def test_a_step_cancelled_while_there_is_no_connection_has_run_whole_or_never_runs(
    server: ScriptedServer, follower: Follower, has_run: bool
) -> None:
    await follower.step(1)
    server.break_at.append(("after run" if has_run else "run", INTERNAL))
    step = asyncio.create_task(follower.session.step([2, 3]))
    while server.break_at:
        await asyncio.sleep(0)
    for session in server.sessions.resident.values():
        server.sessions.save(session)
    await server.kill()
    await asyncio.sleep(0.05)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    following = asyncio.create_task(follower.session.step(4))
    await asyncio.sleep(0.05)
    await server.start()
    assert (await following).position == (4 if has_run else 2)
    assert consumed(server) == ([1, 2, 3, 4] if has_run else [1, 4])


async def test_what_was_built_on_a_cancelled_step_is_refused_as_a_gap(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.may_run.clear()
    cancelled = asyncio.create_task(follower.session.step(2))
    behind = asyncio.create_task(follower.session.step(3))
    await asyncio.sleep(0.05)
    await server.kill()
    await asyncio.sleep(0.05)
    cancelled.cancel()
    server.may_run.set()
    await asyncio.sleep(0)
    server.store.rows["followed"].tokens = [1]
    await server.start()
    with pytest.raises(PositionGap):
        await behind
    await follower.step(4)
    assert consumed(server) == [1, 4]


async def test_a_session_that_another_client_took_is_moved_for_good(server: ScriptedServer, follower: Follower) -> None:
    await follower.step(1)
    server.break_streams()
    async with AsyncClient(server.target) as other:
        winner = await other.open_session(MODEL, id="followed")
        for _ in range(2):
            with pytest.raises(SessionMoved):
                await follower.session.step(2)
        assert (await winner.step(2)).position == 2
        await follower.session.close()
        assert (await winner.step(3)).position == 3


async def test_a_run_on_its_way_when_another_client_took_the_session_says_moved(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.may_run.clear()
    step = asyncio.create_task(follower.session.step(2))
    await asyncio.sleep(0.05)
    await server.kill()
    server.may_run.set()
    server.store.rows["followed"].holder = 12345
    await server.start()
    with pytest.raises(SessionMoved):
        await step


async def test_a_session_closed_by_another_client_during_an_outage_says_so(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    await server.kill()
    server.store.rows.clear()
    server.store.ended["followed"] = "SESSION_CLOSED"
    await server.start()
    with pytest.raises(SessionClosed):
        await follower.session.step(2)


async def test_a_handle_that_went_stale_by_our_own_doing_is_no_error(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    server.sessions.resident["followed"].handle = 0  # as after a call that gave it another epoch
    await follower.step(2)
    assert consumed(server) == [1, 2]


async def test_a_handle_that_went_stale_by_a_reset_of_somebody_else_is_an_error(
    server: ScriptedServer, follower: Follower
) -> None:
    await follower.step(1)
    session = server.sessions.resident["followed"]
    server.sessions.replace(session, [], holder=0)
    session.handle = 0
    with pytest.raises(StaleHandle):
        await follower.session.step(2)


async def test_a_refusal_of_the_stream_is_told_at_once(server: ScriptedServer, follower: Follower) -> None:
    await follower.step(1)
    server.break_at.append(("run", grpc.StatusCode.PERMISSION_DENIED))
    with pytest.raises(AccessDenied):
        await follower.session.step(2)
    assert (await follower.session.step(2)).position == 2


async def test_at_the_bound_of_kept_tokens_steps_wait_until_some_are_durable(server: ScriptedServer) -> None:
    async with AsyncClient(server.target, max_kept_tokens=10) as client:
        follower = Follower(await client.open_session(MODEL, id="followed"))
        for token in range(10):
            await follower.step(token)
        with pytest.raises(StoreUnavailable, match="not yet safe"):
            await follower.session.step(99, timeout_seconds=0.1)
        waiting = asyncio.create_task(follower.step(10, 11))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        server.persist()
        await waiting
        server.persists_always = True
        await follower.step(12)  # whose notice makes room for those that come
        await follower.step(*range(200))
        assert consumed(server) == follower.tokens


async def test_step_many_goes_on_after_a_break(server: ScriptedServer, client: AsyncClient) -> None:
    sessions = await client.open_sessions(MODEL, [f"many-{number}" for number in range(50)])
    expected: dict[str, list[int]] = {session.id: [] for session in sessions}
    for number, point in enumerate(["run", "after run", "open", "after open"]):
        server.break_at.append((point, INTERNAL))
        if "open" in point:
            server.break_at.append(("run", INTERNAL))
        if number == 2:
            await server.restart()
        counts = [1 + (index + number) % 3 for index in range(50)]
        tokens = np.arange(sum(counts)) + number
        result = await client.step_many(sessions, tokens, counts)
        begin = 0
        for session, count, one in zip(sessions, counts, result, strict=True):
            expected[session.id] += tokens[begin : begin + count].tolist()
            begin += count
            assert one.next_token is not None
            assert one.next_token.tolist() == digests(expected[session.id], len(expected[session.id]) - count)
    assert server.break_at == []
    assert {name: consumed(server, name) for name in expected} == expected


async def test_a_step_many_that_was_cancelled_during_an_outage_leaves_sessions_that_just_work(
    server: ScriptedServer, client: AsyncClient
) -> None:
    sessions = await client.open_sessions(MODEL, ["a", "b"])
    await client.step_many(sessions, [1, 1])
    server.persist()
    server.may_run.clear()
    many = asyncio.create_task(client.step_many(sessions, [2, 2]))
    await asyncio.sleep(0.05)
    await server.kill()
    await asyncio.sleep(0.05)
    many.cancel()
    with pytest.raises(asyncio.CancelledError):
        await many
    server.may_run.set()
    await server.start()
    assert (await client.step_many(sessions, [3, 3])).positions.tolist() == [2, 2]
    assert consumed(server, "a") == consumed(server, "b") == [1, 3]


async def test_a_step_many_without_a_connection_until_its_timeout_says_for_whom(
    server: ScriptedServer, client: AsyncClient
) -> None:
    sessions = await client.open_sessions(MODEL, ["a", "b"])
    server.may_run.clear()
    many = asyncio.create_task(client.step_many(sessions, [2, 2], timeout_seconds=0.3))
    await asyncio.sleep(0.05)
    await server.kill()
    with pytest.raises(StepManyFailed) as failed:
        await many
    assert {type(error) for error in failed.value.failures.values()} == {ConnectionLost}
    server.may_run.set()
    await server.start()
    assert (await client.step_many(sessions, [2, 2])).positions.tolist() == [1, 1]


async def test_the_blocking_client_notices_nothing_but_time_either(server: ScriptedServer) -> None:
    def work() -> list[int]:
        with Client(server.target) as client, client.session(MODEL, id="followed") as session:
            return [session.step(token).position for token in range(20)]

    server.break_at += [("run", INTERNAL), ("after run", INTERNAL), ("open", INTERNAL)]
    working = asyncio.create_task(asyncio.to_thread(work))
    while server.break_at:
        await asyncio.sleep(0.001)
    await server.restart()
    assert await working == list(range(1, 21))
    assert server.sessions.store.rows["followed"].tokens == list(range(20))


async def test_a_client_that_closes_during_an_outage_fails_what_waits(server: ScriptedServer) -> None:
    client = AsyncClient(server.target, timeout_seconds=0.3)
    session = await client.open_session(MODEL, id="followed")
    server.may_run.clear()
    step = asyncio.create_task(session.step(1, timeout_seconds=20))
    await asyncio.sleep(0.05)
    await server.kill()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await client.close()
        with pytest.raises(Exception, match="closed"):
            await step
