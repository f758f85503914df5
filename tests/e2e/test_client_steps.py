"""Steps through the client give what the equations give, for every cell and every output."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cellserve import AsyncClient, StepResult
from cellserve.errors import InvalidInput, OutputUnsupported
from tests.support.models import CELLS
from tests.support.oracle import Oracle
from tests.support.server import ServerProcess

TOLERANCE = 2e-5
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
VECTORS = np.random.default_rng(5).standard_normal((7, 3)).astype(np.float32)


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


def oracle(server: ServerProcess, model: str) -> Oracle:
    assert server.models is not None
    return Oracle(server.models / model / "1")


def array(value: NDArray[Any] | None) -> NDArray[Any]:
    assert value is not None
    return value


@pytest.mark.parametrize("cell", CELLS)
async def test_every_output_of_a_token_model_is_the_oracles(
    client: AsyncClient, server: ServerProcess, cell: str
) -> None:
    trace = oracle(server, f"tiny-{cell}").run(TOKENS)
    has_gates = trace.gates.shape[1] > 0
    async with client.session(f"tiny-{cell}") as session:
        result = await session.step(TOKENS, top_k=4, logprobs=True, outputs=True, states=True, gates=has_gates)
        info = session.model
    assert result.position == len(TOKENS)
    np.testing.assert_allclose(array(result.states), trace.states, atol=TOLERANCE)
    np.testing.assert_allclose(array(result.outputs), trace.logits[1:], atol=TOLERANCE)
    np.testing.assert_allclose(array(result.logprobs), trace.logprobs(np.array(TOKENS)), atol=TOLERANCE)
    assert array(result.next_token).tolist() == trace.logits[1:].argmax(axis=1).tolist()
    order = np.argsort(-trace.logits[1:], axis=1)[:, :4]
    assert array(result.top_tokens).tolist() == order.tolist()
    normalised = trace.logits[1:] - np.log(np.exp(trace.logits[1:]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        array(result.top_logprobs), np.take_along_axis(normalised, order, axis=1), atol=TOLERANCE
    )
    if has_gates:
        assert result.gates is not None
        assert tuple(result.gates) == info.gate_names
        for index, name in enumerate(info.gate_names):
            np.testing.assert_allclose(result.gates[name], trace.gates[:, index], atol=TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
async def test_a_vector_model_gives_its_head_outputs_by_default(
    client: AsyncClient, server: ServerProcess, cell: str
) -> None:
    trace = oracle(server, f"vectors-{cell}").run(VECTORS)
    async with client.session(f"vectors-{cell}") as session:
        result = await session.step(VECTORS, states=True)
        assert result.next_token is None
        np.testing.assert_allclose(array(result.outputs), trace.logits[1:], atol=TOLERANCE)
        np.testing.assert_allclose(array(result.states), trace.states, atol=TOLERANCE)
        assert (session.model.input_size, session.model.output_size, session.model.vocab_size) == (3, 2, None)


async def test_the_last_token_alone_gives_one_row(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as one, client.session("tiny-gru") as other:
        every = await one.step(TOKENS, logprobs=True, states=True)
        last = await other.step(TOKENS, at="last", logprobs=True, states=True)
    assert last.position == every.position == len(TOKENS)
    assert array(last.next_token).tolist() == array(every.next_token)[-1:].tolist()
    assert array(last.states).tolist() == array(every.states)[-1:].tolist()
    assert array(last.logprobs).tolist() == array(every.logprobs)[-1:].tolist()


async def test_a_step_that_asks_for_nothing_still_moves_the_session(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        result = await session.step(TOKENS, at="none", logprobs=True)
        assert (result.position, session.position) == (len(TOKENS), len(TOKENS))
        assert result.next_token is None
        assert result.logprobs is None


async def test_a_step_longer_than_a_run_is_the_same_as_its_tokens_one_by_one(
    client: AsyncClient, server: ServerProcess
) -> None:
    tokens = np.random.default_rng(3).integers(0, 11, size=9_000)
    trace = oracle(server, "tiny-lstm").run(tokens)
    async with client.session("tiny-lstm") as session:
        result = await session.step(tokens, logprobs=True, states=True)
        assert (result.position, session.position) == (9_000, 9_000)
        np.testing.assert_allclose(array(result.logprobs), trace.logprobs(tokens), atol=TOLERANCE)
        np.testing.assert_allclose(array(result.states), trace.states, atol=TOLERANCE)
        last = await session.step(tokens, at="last", states=True)
        assert last.position == 18_000
        assert array(last.states).shape == (1, 2, 16)


async def test_a_model_without_a_head_steps_and_gives_its_state(client: AsyncClient, server: ServerProcess) -> None:
    trace = oracle(server, "headless").run(TOKENS)
    async with client.session("headless") as session:
        plain: StepResult = await session.step(TOKENS[:4])
        assert plain.position == 4
        assert plain.next_token is None
        result = await session.step(TOKENS[4:], states=True)
        np.testing.assert_allclose(array(result.states), trace.states[4:], atol=TOLERANCE)
        with pytest.raises(OutputUnsupported) as refusal:
            await session.step(TOKENS, next_token=True)
        assert (refusal.value.reason, refusal.value.session_id) == ("OUTPUT_UNSUPPORTED", session.id)
        assert session.position == len(TOKENS)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("tiny-gru", [3, 11, 2]),
        ("tiny-gru", []),
        ("vectors-gru", np.array([[0.0, np.nan, 0.0]])),
        ("vectors-gru", np.array([[0.0, 1e300, 0.0]])),
        ("vectors-gru", np.empty((0, 3))),
    ],
)
async def test_what_the_server_refuses_has_not_moved_the_session(
    client: AsyncClient, model: str, tokens: list[int]
) -> None:
    good = TOKENS if model == "tiny-gru" else VECTORS
    async with client.session(model) as session, client.session(model) as witness:
        await session.step(good)
        await witness.step(good)
        with pytest.raises(InvalidInput) as refusal:
            await session.step(tokens)
        assert refusal.value.session_id == session.id
        assert session.position == len(good)
        after, expected = await session.step(good, states=True), await witness.step(good, states=True)
        assert after.position == 2 * len(good)
        np.testing.assert_allclose(array(after.states), array(expected.states), atol=TOLERANCE)


async def test_what_can_never_be_right_is_refused_before_it_is_sent(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session, client.session("vectors-gru") as vectors:
        with pytest.raises(TypeError, match=r"\.encode\(\)"):
            await session.step("text")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="256"):
            await session.step(b"text")
        with pytest.raises(ValueError, match=r"shape \(n, 3\)"):
            await vectors.step(np.zeros((2, 4)))
        with pytest.raises(ValueError, match="timeout"):
            await session.step(1, timeout_seconds=0)
        with pytest.raises(ValueError, match="every"):
            await session.step(1, at="often")  # type: ignore[arg-type]
        assert (await session.step(1)).position == 1
        assert (await vectors.step(np.zeros((1, 3)))).position == 1
