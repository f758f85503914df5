"""Exactly once: positions, repeats on the same stream, on another and by unary calls, and held answers."""

import numpy as np
import pytest

from cellserve.v1.values_pb2 import OutputRequest
from tests.support.refusals import expect, of_call
from tests.support.stream import Answer, RawStream, outputs
from tests.support.stream_events import unpack
from tests.support.wire import LONG, Follower, Wire, step_request

pytestmark = pytest.mark.usefixtures("witnesses")

EVERYTHING = outputs("every", top_k=3, next_token=True, logprobs=True, head_outputs=True, states=True, gates=True)


def assert_same(answer: Answer, repeat: Answer) -> None:
    """The two answers are equal, bit for bit."""
    assert (answer.position, answer.num_tokens) == (repeat.position, repeat.num_tokens)
    assert answer.outputs.keys() == repeat.outputs.keys()
    for name, array in answer.outputs.items():
        np.testing.assert_array_equal(repeat.outputs[name], array, err_msg=name)


@pytest.mark.parametrize(
    "wanted",
    [EVERYTHING, outputs("last", states=True), outputs("none")],
    ids=["everything", "states at the last", "none"],
)
@pytest.mark.parametrize("tokens", [[5], [5, 6, 7], [5] * 100], ids=len)
def test_a_repeat_is_answered_again_and_moves_nothing(wire: Wire, tokens: list[int], wanted: OutputRequest) -> None:
    stream = wire.stream()
    session = Follower(wire, stream)
    session.step([1, 2, 3])
    answer = stream.step(session.handle, tokens, wanted, position=3)
    session.consumed(tokens)
    with wire.unmoved(session.id):
        assert_same(answer, stream.step(session.handle, tokens, wanted, position=3))
        # By a unary Step, and by a stream that opened the session after the first one was cut.
        stepped = wire.step(session.id, tokens, wanted, position=3)
        rows = len(tokens) if wanted == EVERYTHING else int("LAST" in str(wanted))
        by_unary = Answer(stepped.position, len(tokens), 1, unpack(stepped.outputs, rows, 3))
        assert_same(answer, by_unary)
    stream.cut()
    session.stream = wire.other().stream()
    session.attach(session.stream.open(session.model, session.id, "ATTACH"))
    with wire.unmoved(session.id):
        assert_same(answer, session.stream.step(session.handle, tokens, wanted, position=3))
    session.step([4])


def test_every_run_of_a_cut_stream_can_be_sent_again(wire: Wire) -> None:
    first = wire.stream()
    session = Follower(wire, first)
    runs = [[1, 2], [3], [4, 5, 6], [7]]
    positions = [0, 2, 3, 6]
    requests = first.run([session.handle] * 4, runs, outputs(states=True), positions=positions)
    first.answer(requests[1])
    first.cut()
    second = wire.stream()
    opened = second.open(session.model, session.id, "ATTACH")
    assert opened.position in {3, 6, 7}
    session.stream = second
    session.attach(opened)
    again = second.run([session.handle] * 4, runs, outputs(states=True), positions=positions)
    for run, request in zip(runs, again, strict=True):
        session.take(run, request)
    session.check()


def test_a_position_ahead_is_a_gap(wire: Wire, session: Follower) -> None:
    expect(session.refuse([1], position=4), "POSITION_GAP", position=3)
    expect(session.refuse([1], position=10**6), "POSITION_GAP", position=3)
    with wire.unmoved(session.id):
        refused = of_call(lambda: wire.step(session.id, [1], position=4))
        expect(refused, "POSITION_GAP", position=3, field="position")


def test_other_tokens_at_a_position_are_a_conflict(wire: Wire, session: Follower) -> None:
    expect(session.refuse([1, 2, 4], outputs(states=True), position=0), "POSITION_CONFLICT", position=3)
    with wire.unmoved(session.id):
        request = step_request(session.id, [3, 2, 1], outputs(states=True), position=0)
        refused = of_call(lambda: wire.sessions.Step(request))
        expect(refused, "POSITION_CONFLICT", position=3, field="position")


@pytest.mark.parametrize(("tokens", "position"), [([2, 3, 4], 1), ([1, 2, 3, 4], 0), ([3, 4, 5, 6, 7], 2)])
def test_a_partial_overlap_is_a_conflict(session: Follower, tokens: list[int], position: int) -> None:
    expect(session.refuse(tokens, outputs(states=True), position=position), "POSITION_CONFLICT", position=3)


@pytest.mark.parametrize(
    "wanted",
    [outputs("last", states=True), outputs("none"), outputs("every", states=True, next_token=True), None],
    ids=["last", "none", "more", "absent"],
)
def test_a_repeat_that_asks_for_other_outputs_is_not_held(session: Follower, wanted: OutputRequest | None) -> None:
    expect(session.refuse([1, 2, 3], wanted, position=0), "ANSWER_NOT_HELD", position=3)


def test_another_division_into_runs_runs_nothing_again(session: Follower) -> None:
    session.step([4, 5])
    for tokens, position in (([1, 2], 0), ([1, 2, 3, 4], 0), ([1, 2, 3, 4, 5], 0), ([2, 3], 1), ([5], 4)):
        refused = session.refuse(tokens, outputs(states=True), position=position)
        assert refused.reason in {"ANSWER_NOT_HELD", "POSITION_CONFLICT"}
        expect(refused, refused.reason, position=5)


@pytest.mark.parametrize("how", ["by a command", "beside a run"])
def test_an_acknowledged_answer_is_no_longer_held(session: Follower, how: str) -> None:
    stream, states = session.stream, outputs(states=True)
    session.step([4])
    if how == "by a command":
        stream.acknowledge(session.handle, 3)
    else:
        [request] = stream.run([session.handle], [[5]], states, acknowledged_positions=[3])
        session.take([5], request)
    expect(session.refuse([1, 2, 3], states, position=0), "ANSWER_NOT_HELD", position=session.position)
    assert stream.step(session.handle, [4], states, position=3).position == 4


def test_acknowledging_inside_an_answer_keeps_it(session: Follower) -> None:
    session.stream.acknowledge(session.handle, 2)
    assert session.stream.step(session.handle, [1, 2, 3], outputs(states=True), position=0).position == 3


def test_acknowledging_ahead_lets_go_of_what_there_is(session: Follower) -> None:
    session.stream.acknowledge(session.handle, 10**9)
    expect(session.refuse([1, 2, 3], outputs(states=True), position=0), "ANSWER_NOT_HELD", position=3)
    session.step([4])


def test_the_answers_held_are_the_newest_up_to_the_limit(session: Follower) -> None:
    session.stream.acknowledge(session.handle, 3)
    for _ in range(70):
        session.stream.step(session.handle, [1], outputs("last", next_token=True))
    session.consumed([1] * 70)
    wanted = outputs("last", next_token=True)
    expect(session.refuse([1], wanted, position=3 + 70 - 65), "ANSWER_NOT_HELD", position=73)
    assert session.stream.step(session.handle, [1], wanted, position=3 + 70 - 64).position == 10


def test_an_answer_over_the_byte_limit_is_given_once(wire: Wire, session: Follower) -> None:
    tokens = [1] * 1100  # of 64 bytes of state each: over max_held_answer_bytes
    session.stream.step(session.handle, tokens, outputs(states=True))
    session.consumed(tokens)
    expect(session.refuse(tokens, outputs(states=True), position=3), "ANSWER_NOT_HELD", position=1103)


def test_runs_with_positions_are_pipelined_in_order(session: Follower) -> None:
    runs = [[token % 11] * (token % 5 + 1) for token in range(40)]
    positions = np.cumsum([3, *map(len, runs)])[:-1]
    requests = session.stream.run([session.handle] * 40, runs, outputs(states=True), positions=positions)
    for run, request in zip(runs, requests, strict=True):
        session.take(run, request)
    answered = [request for request in session.stream.account.order if request in set(requests)]
    assert answered == requests


def test_a_repeat_of_a_run_that_is_under_way_joins_it(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    follower = outputs("every", next_token=True)
    [running] = stream.run([session.handle], [LONG], follower, positions=[0])
    stream.begun(running)
    repeats = stream.run([session.handle] * 2, [LONG] * 2, follower, positions=[0, 0])
    by_unary = wire.sessions.Step.future(step_request(session.session_id, LONG, follower, 0), timeout=30)
    answer = stream.answer(running)
    for repeat in repeats:
        assert_same(answer, stream.answer(repeat))
    assert by_unary.result().position == len(LONG)
    assert list(by_unary.result().outputs.next_tokens) == answer.outputs["next_tokens"].tolist()
    assert wire.state(session.session_id).position == len(LONG)


def test_a_run_whose_stream_was_cut_is_joined_from_another(wire: Wire, stream: RawStream) -> None:
    first = wire.stream()
    session = first.open("pycode")
    wanted = outputs("every", next_token=True)
    [running] = first.run([session.handle], [LONG], wanted, positions=[0])
    first.begun(running)
    first.cut()
    opened = stream.open("pycode", session.session_id, "ATTACH")
    assert opened.position == len(LONG)  # accepted, and under way
    answer = stream.step(opened.handle, LONG, wanted, position=0)
    expected = wire.trace("pycode", LONG).logits[1:].argmax(axis=1)
    assert (answer.position, answer.num_tokens) == (len(LONG), len(LONG))
    np.testing.assert_array_equal(answer.outputs["next_tokens"], expected)


def test_a_joined_run_with_other_tokens_or_outputs_is_refused(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    wanted = outputs("every", next_token=True)
    [running] = stream.run([session.handle], [LONG], wanted, positions=[0])
    stream.begun(running)
    other_tokens = stream.refuse(session.handle, LONG[:-1] + b"b", wanted, position=0)
    expect(other_tokens, "POSITION_CONFLICT", position=len(LONG))
    other_outputs = stream.refuse(session.handle, LONG, outputs("last", next_token=True), position=0)
    expect(other_outputs, "ANSWER_NOT_HELD", position=len(LONG))
    assert stream.answer(running).position == len(LONG)


@pytest.mark.parametrize("how", ["stream", "unary"])
def test_a_refused_run_can_be_sent_again_mended(wire: Wire, session: Follower, how: str) -> None:
    expect(session.refuse([1, 99], outputs(states=True), position=3), "INVALID_INPUT")
    if how == "stream":
        [request] = session.stream.run([session.handle], [[1, 9]], outputs(states=True), positions=[3])
        session.take([1, 9], request)
    else:
        assert wire.step(session.id, [1, 9], position=3).position == 5
        session.consumed([1, 9])


def test_after_a_reset_positions_begin_again(session: Follower) -> None:
    session.restart(session.stream.done(session.stream.reset(session.handle)).handle)
    expect(session.refuse([1, 2, 3], outputs(states=True), position=3), "POSITION_GAP", position=0)
    [request] = session.stream.run([session.handle], [[1, 2, 3]], outputs(states=True), positions=[0])
    session.take([1, 2, 3], request)
