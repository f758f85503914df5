"""Generate: sampling on the server equals stepping the sampled tokens, drawn as the settings say."""

from typing import Any

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import fork, generate
from tests.support.stream import outputs
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")


def greedy(session: Follower, number: int) -> list[int]:
    """What always taking the likeliest token gives, by the oracle."""
    tokens: list[int] = []
    trace = session.trace()
    for _ in range(number):
        tokens.append(int(trace.logits[-1].argmax()))
        trace = session.oracle.run(tokens[-1:], trace.states[-1])
    return tokens


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str
)
def test_the_likeliest_tokens_are_taken(session: Follower, settings: dict[str, Any]) -> None:
    expected = greedy(session, 20)
    result = generate(session, seed=1, **settings)
    assert (result.tokens, result.position, result.finish_reason) == (expected, 23, "LENGTH")
    session.consumed(expected)
    session.check()


@pytest.mark.parametrize("number", [1, 15, 16, 17, 200])
def test_generating_equals_stepping_the_sampled_tokens(session: Follower, number: int) -> None:
    by_hand = fork(session)
    result = generate(session, max_tokens=number, seed=7, logprobs=True)
    assert (len(result.tokens), result.position, result.seed) == (number, 3 + number, 7)
    answer = session.stream.step(by_hand.handle, result.tokens, outputs(logprobs=True))
    by_hand.consumed(result.tokens)
    np.testing.assert_allclose(result.logprobs, answer.outputs["logprobs"], rtol=0, atol=1e-5)
    session.consumed(result.tokens)
    session.check()
    by_hand.check()
    expected = session.trace().logprobs(np.array(session.tokens))[3:]
    np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=1e-4)
    session.step([1])


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(session: Follower) -> None:
    first, second, other = (fork(session) for _ in range(3))
    drawn = generate(first, seed=5, max_tokens=50).tokens
    assert generate(second, seed=5, max_tokens=50).tokens == drawn
    assert generate(other, seed=6, max_tokens=50).tokens != drawn


def test_the_server_tells_the_seed_that_it_chose(session: Follower) -> None:
    first, second, third = (fork(session) for _ in range(3))
    result = generate(first, max_tokens=50)
    assert generate(second, seed=result.seed, max_tokens=50).tokens == result.tokens
    assert generate(third, max_tokens=50).seed != result.seed


def test_a_draw_depends_on_seed_position_and_distribution_alone(session: Follower) -> None:
    whole, parted = fork(session), fork(session)
    expected = generate(whole, seed=9, max_tokens=40).tokens
    drawn: list[int] = []
    for number in (1, 16, 3, 20):
        drawn += generate(parted, seed=9, max_tokens=number).tokens
    assert drawn == expected


def test_tokens_are_drawn_as_often_as_the_model_says(wire: Wire, session: Follower) -> None:
    number = 400
    logits = session.trace().logits[-1]
    state = wire.state(session.id).SerializeToString()
    copies = wire.open(session.model, number, states=[state] * number).session_ids
    for settings, scale, kept in (({}, 1.0, 11), ({"temperature": 2.0}, 2.0, 11), ({"top_k": 3}, 1.0, 3)):
        expected = np.exp(logits / scale) * (logits >= np.sort(logits)[-kept])
        expected *= number / expected.sum()
        calls = [
            wire.sessions.Generate(pb.GenerateRequest(session_id=copy, max_tokens=1, seed=seed, **settings), timeout=30)
            for seed, copy in enumerate(copies)
        ]
        drawn = np.bincount([token for call in calls for message in call for token in message.tokens], minlength=11)
        assert drawn.sum() == number
        assert not drawn[expected == 0].any()
        likely = expected > 0
        chi_square = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
        assert chi_square < 40, (settings, drawn, expected)  # 10 degrees of freedom: once in 60,000
        back = pb.ImportSessionRequest(state=wire.state(session.id))
        for copy in copies:
            back.session_id = copy
            wire.sessions.ImportSession(back)


def test_top_p_keeps_the_smallest_set_that_is_likely_enough(session: Follower) -> None:
    logits = session.trace().logits[-1]
    weights = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-weights)
    top_p = float(weights[order[:3]].sum() - 0.5 * weights[order[2]])  # the third is needed, the fourth is not
    drawn = {generate(fork(session), top_p=top_p, seed=seed, max_tokens=1).tokens[0] for seed in range(60)}
    assert drawn == set(order[:3].tolist())


def test_a_stop_token_is_the_last_one_streamed_and_is_consumed(session: Follower) -> None:
    free = generate(fork(session), seed=3, max_tokens=200).tokens
    stop = free[30]
    end = free.index(stop) + 1
    result = generate(session, seed=3, max_tokens=200, stop_tokens=[stop])
    assert (result.tokens, result.finish_reason, result.position) == (free[:end], "STOP", 3 + end)
    session.consumed(result.tokens)
    session.check()
