"""Many steps at once: in the order asked, each session for itself, through failures and withdrawals."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from cellserve import AsyncClient, Client, StepResult
from cellserve.errors import InvalidInput, PositionGap, SessionBusy, StepManyFailed, TimedOut
from tests.support.oracle import Oracle
from tests.support.processes import children
from tests.support.server import ServerProcess


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


@contextmanager
def halted(server: ServerProcess) -> Iterator[None]:
    """The server does not move: what is sent to it stays on its way."""
    assert server.process is not None
    pids = [server.process.pid, *children(server.process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def final_state(result: StepResult) -> NDArray[np.float32]:
    assert result.states is not None
    state: NDArray[np.float32] = result.states[-1]
    return state


async def test_each_of_many_sessions_stepping_at_once_has_its_own_state(
    client: AsyncClient, server: ServerProcess
) -> None:
    assert server.models is not None
    oracle = Oracle(server.models / "tiny-gru" / "1")
    sequences = np.random.default_rng(11).integers(0, 11, size=(200, 12))

    async def follow(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        async with client.session("tiny-gru") as session:
            for token in tokens[:-1]:
                await session.step(int(token))
            return final_state(await session.step(int(tokens[-1]), states=True))

    states = await asyncio.gather(*map(follow, sequences))
    for tokens, state in zip(sequences, states, strict=True):
        np.testing.assert_allclose(state, oracle.run(tokens).states[-1], atol=2e-5)


async def test_steps_of_one_session_take_effect_in_the_order_asked(client: AsyncClient, server: ServerProcess) -> None:
    assert server.models is not None
    tokens = np.random.default_rng(12).integers(0, 11, size=500)
    trace = Oracle(server.models / "tiny-lstm" / "1").run(tokens)
    async with client.session("tiny-lstm") as session:
        steps = [
            session.step(tokens[begin : begin + 5], at="last" if begin % 2 else "every", states=True)
            for begin in range(0, 500, 5)
        ]
        results = await asyncio.gather(*steps)
        assert [result.position for result in results] == list(range(5, 501, 5))
        for result in results:
            np.testing.assert_allclose(final_state(result), trace.states[result.position - 1], atol=2e-5)


async def test_more_than_a_session_may_have_pending_waits_for_its_turn(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        runs = [[number % 11] * 3000 for number in range(10)]
        results = await asyncio.gather(*(session.step(run, at="none") for run in runs), session.step(1))
        assert [result.position for result in results] == [*range(3000, 30_001, 3000), 30_001]


async def test_when_one_of_several_is_refused_those_behind_it_are_gaps_and_the_next_works(
    client: AsyncClient,
) -> None:
    async with client.session("tiny-gru") as session:
        first, refused, behind, last = await asyncio.gather(
            session.step([1, 2]), session.step(300), session.step(3), session.step([4] * 5000), return_exceptions=True
        )
        assert isinstance(first, StepResult)
        assert isinstance(refused, InvalidInput)
        assert isinstance(behind, PositionGap)
        assert behind.position == 2
        assert isinstance(last, PositionGap | StepResult)
        position = session.position
        assert position == (5002 if isinstance(last, StepResult) else 2)
        assert (await session.step(5)).position == position + 1


async def test_a_cancelled_step_leaves_a_session_that_just_works(client: AsyncClient, server: ServerProcess) -> None:
    async with client.session("tiny-gru") as session, client.session("tiny-gru") as other:
        await session.step([1, 2, 3])
        with halted(server):
            step = asyncio.create_task(session.step([4, 5]))
            await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            following = asyncio.create_task(session.step(6))
        result = await following
        # Withdrawn before it ran, or run: the session stands where the server says, and nothing ran twice.
        assert result.position in (4, 6)
        assert session.position == result.position
        assert (await other.step(1)).position == 1


async def test_whatever_is_cancelled_no_token_is_lost_or_runs_twice(client: AsyncClient, server: ServerProcess) -> None:
    assert server.models is not None
    oracle = Oracle(server.models / "tiny-gru" / "1")

    async def follow(seed: int) -> None:
        random = np.random.default_rng(seed)
        consumed: list[int] = []
        async with client.session("tiny-gru") as session:
            for _ in range(40):
                tokens = random.integers(0, 11, size=random.integers(1, 5)).tolist()
                step = asyncio.create_task(session.step(tokens))
                for _ in range(random.integers(0, 8)):
                    await asyncio.sleep(0)
                step.cancel()
                given_up = [] if (await asyncio.wait([step])) and not step.cancelled() else tokens
                if not given_up:
                    consumed += tokens
                following = random.integers(0, 11, size=2).tolist()
                result = await session.step(following, states=True)
                # The step given up has run whole, or not at all.
                if result.position == len(consumed) + len(given_up) + 2:
                    consumed += given_up
                consumed += following
                assert result.position == len(consumed)
            np.testing.assert_allclose(final_state(result), oracle.run(consumed).states[-1], atol=2e-5)

    await asyncio.gather(*map(follow, range(30)))


async def test_a_step_that_times_out_leaves_a_session_that_just_works(
    client: AsyncClient, server: ServerProcess
) -> None:
    async with client.session("tiny-gru") as session:
        await session.step([1, 2, 3])
        with halted(server):
            with pytest.raises(TimedOut) as timed_out:
                await session.step([4, 5], timeout_seconds=0.05)
            assert timed_out.value.session_id == session.id
            assert isinstance(timed_out.value, TimeoutError)
            with pytest.raises(TimedOut):  # waits for the outcome of the one before
                await session.step(6, timeout_seconds=0.05)
        result = await session.step(7)
        assert result.position in (4, 6)
        assert (await session.step(8)).position == result.position + 1


async def test_a_step_many_that_times_out_says_for_whom_and_leaves_sessions_that_just_work(
    client: AsyncClient, server: ServerProcess
) -> None:
    sessions = await client.open_sessions("tiny-gru", 10)
    with halted(server), pytest.raises(StepManyFailed) as failed:
        await client.step_many(sessions, [1] * 10, timeout_seconds=0.05)
    assert sorted(failed.value.failures) == list(range(10))
    assert {type(error) for error in failed.value.failures.values()} == {TimedOut}
    result = await client.step_many(sessions, [1] * 10)
    assert set(result.positions.tolist()) <= {1, 2}


async def test_every_call_times_out_at_a_server_that_does_not_move(server: ServerProcess) -> None:
    async with AsyncClient(server.target, timeout_seconds=0.1) as client:
        session = await client.open_session("tiny-gru", timeout_seconds=10)
        calls = [client.ping, client.models, client.sessions, session.export_state, session.fork, session.reset]
        with halted(server):
            for call in calls:
                with pytest.raises(TimedOut):
                    await call()
            with pytest.raises(TimedOut):
                await client.open_session("tiny-gru")
            with pytest.raises(TimedOut):
                await client.open_session("tiny-lstm")
            with pytest.raises(TimedOut):
                async for _ in session.generate(max_tokens=3):
                    raise AssertionError("nothing can come")
        assert (await session.step(1, timeout_seconds=10)).position in (1, 2, 3, 4)
        for left in await client.sessions(timeout_seconds=10):
            await (await client.open_session(left.model, id=left.id, timeout_seconds=10)).close(timeout_seconds=10)


async def test_closing_takes_no_longer_than_it_may_at_a_server_that_does_not_move(server: ServerProcess) -> None:
    client = AsyncClient(server.target, timeout_seconds=0.2)
    session = await client.open_session("tiny-gru", timeout_seconds=10)
    with halted(server):
        async with asyncio.timeout(10):
            await client.close()
    async with AsyncClient(server.target) as other:
        await (await other.open_session("tiny-gru", id=session.id)).close()


async def test_a_session_that_generates_is_busy(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        generation = session.generate(max_tokens=1000)
        await anext(generation)
        with pytest.raises(SessionBusy):
            await session.step(1)
        await generation.aclose()
        assert (await session.step(1)).position == session.position


async def test_closing_a_session_waits_for_the_steps_asked_for_before(client: AsyncClient) -> None:
    session = await client.open_session("tiny-gru")
    steps = [asyncio.create_task(session.step([1] * 100)) for _ in range(20)]
    await asyncio.sleep(0)
    await session.close()
    assert [(await step).position for step in steps] == list(range(100, 2001, 100))


def test_threads_share_a_client_and_keep_their_states_apart(server: ServerProcess) -> None:
    assert server.models is not None
    oracle = Oracle(server.models / "tiny-gru" / "1")
    sequences = np.random.default_rng(13).integers(0, 11, size=(16, 20))
    states: dict[int, NDArray[np.float32]] = {}
    with Client(server.target) as client:

        def follow(index: int) -> None:
            with client.session("tiny-gru") as session:
                for token in sequences[index]:
                    states[index] = final_state(session.step(int(token), states=True))

        threads = [threading.Thread(target=follow, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, tokens in enumerate(sequences):
        np.testing.assert_allclose(states[index], oracle.run(tokens).states[-1], atol=2e-5)
