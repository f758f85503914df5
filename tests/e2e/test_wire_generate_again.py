"""Generate: broken off, taken up again, repeated; and what is refused meanwhile."""

from typing import Any

import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import MANY, begin, break_off, generate, new_copy, request_of
from tests.support.refusals import expect, of_call
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")


def test_generating_meanwhile_nothing_else_may_move_the_session(wire: Wire, session: Follower) -> None:
    call = begin(session, seed=1)
    state = wire.state(wire.open(session.model).session_ids[0])
    for other in (
        lambda: wire.step(session.id, [1]),
        lambda: wire.sessions.ResetSession(pb.ResetSessionRequest(session_id=session.id)),
        lambda: wire.sessions.ExportSession(pb.ExportSessionRequest(session_id=session.id)),
        lambda: wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id)),
        lambda: wire.sessions.ImportSession(pb.ImportSessionRequest(session_id=session.id, state=state)),
        lambda: wire.sessions.Generate(request_of(session)),
        lambda: wire.sessions.Generate(request_of(session, position=3, temperature=0.5)),
    ):
        expect(of_call(other), "SESSION_BUSY")
    expect(session.stream.refuse(session.handle, [1]), "SESSION_BUSY")
    expect(session.stream.refuse(session.handle, [1], position=3), "SESSION_BUSY")
    expect(session.stream.refusal(session.stream.reset(session.handle)), "SESSION_BUSY")
    break_off(session, call, seed=1)


def test_breaking_off_stops_it_and_leaves_the_session_whole(session: Follower) -> None:
    break_off(session, begin(session, seed=4), seed=4)
    session.step([5, 6])


def test_a_deadline_breaks_off_too(wire: Wire, session: Follower) -> None:
    call = wire.sessions.Generate(request_of(session, max_tokens=MANY, seed=2), timeout=0.1)
    assert of_call(lambda: call).code == "DEADLINE_EXCEEDED"
    break_off(session, call, seed=2)


def test_closing_breaks_a_generate_off(wire: Wire, session: Follower) -> None:
    other = new_copy(session)
    call = begin(other)
    closed = wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=other.id))
    assert closed.position > 3
    expect(of_call(lambda: call), "SESSION_CLOSED")


def test_a_takeover_breaks_a_generate_off(wire: Wire, session: Follower) -> None:
    call = begin(session, seed=3)
    other = wire.stream()
    opened = other.open(session.model, session.id, "ATTACH")
    expect(of_call(lambda: call), "SESSION_MOVED")
    assert session.stream.loss().reason == "SESSION_MOVED"
    session.stream = other
    session.attach(opened)
    break_off(session, call, seed=3)
    assert session.position == opened.position


def test_a_generate_waits_for_the_runs_accepted_before_it(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream)
    [run] = stream.run([session.handle], [[1] * 1000], outputs(states=True))
    stream.begun(run)
    result = generate(session, temperature=0)
    assert result.position == 1020
    session.take([1] * 1000, run)
    session.consumed(result.tokens)
    session.check()


@pytest.mark.parametrize("number", [1, 16, 50])
def test_a_repeat_gives_the_same_tokens_and_moves_nothing(wire: Wire, session: Follower, number: int) -> None:
    settings = {"position": 3, "seed": 11, "max_tokens": number, "logprobs": True}
    result = generate(session, **settings)
    session.consumed(result.tokens)
    with wire.unmoved(session.id):
        assert generate(session, **settings) == result


def test_a_repeat_of_a_stopped_generate_stops_at_the_same_token(wire: Wire, session: Follower) -> None:
    settings = {"position": 3, "seed": 11, "max_tokens": 500, "stop_tokens": [7, 8]}
    result = generate(session, **settings)
    assert result.finish_reason == "STOP"
    session.consumed(result.tokens)
    with wire.unmoved(session.id):
        assert generate(session, **settings) == result


@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_generate_that_was_cut_is_taken_up_where_it_ended(session: Follower, more: int) -> None:
    copy = new_copy(session)
    call = begin(session, seed=8, position=3)
    for _ in range(5):
        next(call)
    break_off(session, call, seed=8)
    number = session.position - 3 + more
    if number > 900:
        pytest.skip("this machine generated more than is held before it was stopped")
    expected = generate(copy, seed=8, max_tokens=number)
    again = generate(session, seed=8, position=3, max_tokens=number)
    assert (again.tokens, again.finish_reason) == (expected.tokens, "LENGTH")
    session.consumed(again.tokens[session.position - 3 :])
    session.check()


def test_the_same_generate_asked_twice_at_once_ends_the_first_and_is_answered_whole(session: Follower) -> None:
    copy = new_copy(session)
    first = begin(session, seed=8, position=3)
    again = session.wire.sessions.Generate(request_of(session, seed=8, position=3, max_tokens=600), timeout=30)
    tokens = [token for message in again for token in message.tokens]
    assert of_call(lambda: first).code in {"CANCELLED", "OK"}
    assert tokens == generate(copy, seed=8, max_tokens=600).tokens
    session.consumed(tokens)


@pytest.mark.parametrize("settings", [{"seed": 2}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_a_repeat_with_other_settings_is_a_conflict(wire: Wire, session: Follower, settings: dict[str, Any]) -> None:
    session.consumed(generate(session, seed=1, position=3).tokens)
    with wire.unmoved(session.id):
        again = request_of(session, **({"seed": 1, "position": 3} | settings))
        expect(of_call(lambda: wire.sessions.Generate(again)), "POSITION_CONFLICT", position=23)


def test_a_generate_where_other_tokens_have_run_is_a_conflict(wire: Wire, session: Follower) -> None:
    with wire.unmoved(session.id):
        again = request_of(session, position=0)
        expect(of_call(lambda: wire.sessions.Generate(again)), "POSITION_CONFLICT", position=3)


def test_a_run_where_tokens_were_generated_is_refused_or_answered_but_never_run(session: Follower) -> None:
    session.consumed(generate(session, seed=1, position=3).tokens)
    for tokens in (session.tokens[3:], [1], session.tokens[3:4]):
        refused = session.refuse(tokens, outputs(states=True), position=3)
        assert refused.reason in {"POSITION_CONFLICT", "ANSWER_NOT_HELD"}
        expect(refused, refused.reason, position=23)


def test_a_generate_ahead_of_the_session_is_a_gap(wire: Wire, session: Follower) -> None:
    with wire.unmoved(session.id):
        ahead = request_of(session, position=4)
        expect(of_call(lambda: wire.sessions.Generate(ahead)), "POSITION_GAP", position=3, field="position")


def test_tokens_that_are_no_longer_held_are_not_made_up(wire: Wire, session: Follower) -> None:
    settings = {"seed": 1, "position": 3, "max_tokens": 16 * 70}  # more slices than are held
    session.consumed(generate(session, **settings).tokens)
    with wire.unmoved(session.id):
        again = request_of(session, **settings)
        expect(of_call(lambda: wire.sessions.Generate(again)), "ANSWER_NOT_HELD", position=3 + 16 * 70)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "too many tokens": ({"max_tokens": 1_000_001}, "max_tokens"),
    "negative temperature": ({"temperature": -0.1}, "temperature"),
    "temperature not a number": ({"temperature": float("nan")}, "temperature"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature"),
    "top_p of none": ({"top_p": 0.0}, "top_p"),
    "top_p above one": ({"top_p": 1.01}, "top_p"),
    "top_p not a number": ({"top_p": float("nan")}, "top_p"),
    "unknown stop token": ({"stop_tokens": [3, 11]}, "stop_tokens"),
    "too many stop tokens": ({"stop_tokens": [1] * 257}, "stop_tokens"),
    "vast position": ({"position": 2**64 - 1}, "position"),
}


@pytest.mark.parametrize(("fields", "field"), BAD.values(), ids=BAD)
def test_impossible_settings_are_refused(wire: Wire, session: Follower, fields: dict[str, Any], field: str) -> None:
    with wire.unmoved(session.id):
        request = request_of(session, **fields)
        expect(of_call(lambda: wire.sessions.Generate(request)), "INVALID_INPUT", field=field)


@pytest.mark.parametrize("model", ["vectors-gru", "headless"])
def test_a_model_without_vocabulary_or_head_cannot_generate(wire: Wire, stream: RawStream, model: str) -> None:
    session = Follower(wire, stream, model)
    expect(of_call(lambda: wire.sessions.Generate(request_of(session))), "OUTPUT_UNSUPPORTED")
    session.check()
