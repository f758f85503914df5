"""step_many gives what a step of each session gives, as columns."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.errors import InvalidInput, SessionMoved, StepManyFailed
from tests.support.server import ServerProcess


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def pairs(client: AsyncClient, model: str, number: int) -> tuple[list[AsyncSession], list[AsyncSession]]:
    return await client.open_sessions(model, number), await client.open_sessions(model, number)


async def test_one_token_for_each_of_many_sessions(client: AsyncClient) -> None:
    together, alone = await pairs(client, "tiny-gru", 100)
    for number in range(3):
        tokens = (np.arange(100) + number) % 11
        many = await client.step_many(together, tokens, top_k=2, logprobs=True, states=True, gates=True)
        each = await asyncio.gather(
            *(
                session.step(int(token), top_k=2, logprobs=True, states=True, gates=True)
                for session, token in zip(alone, tokens, strict=True)
            )
        )
        assert many.positions.tolist() == [number + 1] * 100
        assert [session.position for session in together] == [number + 1] * 100
        for ours, theirs in zip(many, each, strict=True):
            assert ours.position == theirs.position
            for name in ("next_token", "top_tokens", "top_logprobs", "logprobs", "states"):
                np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
            assert ours.gates is not None
            assert theirs.gates is not None
            for name, gate in ours.gates.items():
                np.testing.assert_allclose(gate, theirs.gates[name], atol=1e-5)


async def test_runs_of_different_lengths_some_longer_than_the_server_takes(client: AsyncClient) -> None:
    counts = np.array([1, 5000, 17, 4096, 4097, 1])
    tokens = np.random.default_rng(1).integers(0, 11, size=counts.sum())
    together, alone = await pairs(client, "tiny-lstm", len(counts))
    many = await client.step_many(together, tokens, counts, logprobs=True)
    assert many.positions.tolist() == many.counts.tolist() == counts.tolist()
    assert many.logprobs is not None
    assert many.logprobs.shape == (counts.sum(),)
    begin = 0
    for ours, session, count in zip(many, alone, counts.tolist(), strict=True):
        theirs = await session.step(tokens[begin : begin + count], logprobs=True)
        begin += count
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)  # type: ignore[arg-type]
    last = await client.step_many(together, tokens, counts, at="last", states=True)
    assert last.states is not None
    assert last.states.shape == (6, 2, 16)
    assert last.positions.tolist() == (2 * counts).tolist()


async def test_vectors_of_many_sessions_are_one_array(client: AsyncClient) -> None:
    vectors = np.random.default_rng(2).standard_normal((7, 3))
    together, alone = await pairs(client, "vectors-gru", 3)
    many = await client.step_many(together, vectors, [2, 4, 1])
    for ours, session, part in zip(many, alone, np.split(vectors, [2, 6]), strict=True):
        theirs = await session.step(part)
        np.testing.assert_allclose(ours.outputs, theirs.outputs, atol=1e-5)  # type: ignore[arg-type]


async def test_bytes_are_the_tokens_of_a_byte_model(client: AsyncClient) -> None:
    together, alone = await pairs(client, "pycode", 2)
    many = await client.step_many(together, b"importdef", [6, 3], at="last")
    each = [await alone[0].step(b"import", at="last"), await alone[1].step(b"def", at="last")]
    assert many.next_token is not None
    assert many.next_token.tolist() == [result.next_token[0] for result in each]  # type: ignore[index]


async def test_sessions_that_fail_are_told_with_the_answers_of_the_others(
    client: AsyncClient, server: ServerProcess
) -> None:
    names = [f"failing-{number}" for number in range(4)]
    sessions = await client.open_sessions("tiny-gru", names, keep=False)
    async with AsyncClient(server.target) as other:
        moved = await other.open_session("tiny-gru", id="failing-2", keep=False)
        with pytest.raises(StepManyFailed) as failed:
            await client.step_many(sessions, [1, 300, 3, 4])
        await moved.close()
    failures, result = failed.value.failures, failed.value.result
    assert list(failures) == [1, 2]
    assert isinstance(failures[1], InvalidInput)
    assert isinstance(failures[2], SessionMoved)
    assert failures[1].session_id == "failing-1"
    assert result.positions[[0, 3]].tolist() == [1, 1]
    assert result.next_token is not None
    assert result.next_token.shape == (2,)
    assert [len(each.next_token) for each in result] == [1, 0, 0, 1]  # type: ignore[arg-type]
    working = [sessions[0], sessions[1], sessions[3]]
    assert (await client.step_many(working, [1, 1, 1])).positions.tolist() == [2, 1, 2]


async def test_single_steps_and_step_many_of_the_same_sessions_follow_each_other(client: AsyncClient) -> None:
    sessions = await client.open_sessions("tiny-gru", 20)
    singles = [asyncio.create_task(session.step([1, 2])) for session in sessions]
    await asyncio.sleep(0)
    many = await client.step_many(sessions, np.zeros(20, dtype=np.int64))
    assert many.positions.tolist() == [3] * 20
    assert [(await single).position for single in singles] == [2] * 20


async def test_a_cancelled_step_many_leaves_sessions_that_just_work(client: AsyncClient) -> None:
    sessions = await client.open_sessions("tiny-gru", 50)
    step = asyncio.create_task(client.step_many(sessions, np.zeros(50, dtype=np.int64)))
    await asyncio.sleep(0)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    result = await client.step_many(sessions, np.zeros(50, dtype=np.int64))
    assert set(result.positions.tolist()) <= {1, 2}
    assert [session.position for session in sessions] == result.positions.tolist()


async def test_arguments_that_do_not_fit_together_are_refused(client: AsyncClient) -> None:
    sessions = await client.open_sessions("tiny-gru", 2)
    async with client.session("tiny-lstm") as other_model:
        for wrong, tokens, counts, problem in (
            ([], [], None, "at least one"),
            (sessions, [1, 2, 3], None, "counts"),
            (sessions, [1, 2, 3], [1, 1], "add up"),
            (sessions, [1, 2, 3], [4, -1], "add up"),
            ([sessions[0], sessions[0]], [1, 2], None, "more than once"),
            ([sessions[0], other_model], [1, 2], None, "one model"),
        ):
            with pytest.raises(ValueError, match=problem):
                await client.step_many(wrong, tokens, counts)
        with pytest.raises(TypeError, match="integers"):
            await client.step_many(sessions, [1, 2], [1.0, 1.0])  # type: ignore[list-item]
    assert (await client.step_many(sessions, [1, 2])).positions.tolist() == [1, 1]
