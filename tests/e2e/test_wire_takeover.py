"""One writer at a time: a session that is opened elsewhere has moved, and its earlier holder is told so."""

import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.refusals import expect
from tests.support.stream import RawStream, outputs
from tests.support.wire import LONG, Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")


@pytest.fixture
def taker(wire: Wire) -> RawStream:
    return wire.other().stream()


def test_attaching_takes_a_session_over(wire: Wire, stream: RawStream, taker: RawStream) -> None:
    session = Follower(wire, stream)
    session.step([1, 2, 3])
    before = session.handle
    opened = taker.open(session.model, session.id)
    assert (opened.created, opened.position, opened.epoch) == (False, 3, 2)
    assert opened.handle != before
    lost = stream.loss()
    assert (lost.handle, lost.reason) == (before, "SESSION_MOVED")
    for _ in range(2):
        expect(session.refuse_handle(before, [1]), "SESSION_MOVED")
    expect(stream.refusal(stream.reset(before)), "SESSION_MOVED")
    expect(stream.refusal(stream.close_session(before)), "SESSION_MOVED")
    session.stream = taker
    session.attach(opened)
    session.step([4])


def test_a_session_can_be_taken_back(wire: Wire, stream: RawStream, taker: RawStream) -> None:
    session = Follower(wire, stream)
    for epoch, holder in enumerate((taker, stream, taker, stream), 2):
        opened = holder.open(session.model, session.id, "ATTACH")
        assert opened.epoch == epoch
        session.stream = holder
        session.attach(opened)
        session.step([epoch])
    assert [taker.loss().reason for _ in range(2)] == ["SESSION_MOVED"] * 2


def test_a_takeover_withdraws_queued_runs_and_lets_the_running_one_finish(
    wire: Wire, stream: RawStream, taker: RawStream
) -> None:
    session = stream.open("pycode")
    positions = [0, len(LONG), len(LONG) + 2]
    wanted = outputs("every", next_token=True)
    running, queued, behind = stream.run([session.handle] * 3, [LONG, b"ab", b"c"], wanted, positions=positions)
    stream.begun(running)
    opened = taker.open("pycode", session.session_id)
    assert opened.position == len(LONG)
    expect(stream.refusal(queued), "SESSION_MOVED")
    expect(stream.refusal(behind), "SESSION_MOVED")
    assert stream.loss().reason == "SESSION_MOVED"
    # The new holder's run waits for the one that is still running.
    answer = taker.step(opened.handle, b"x", wanted, position=len(LONG))
    assert answer.position == len(LONG) + 1
    assert stream.answer(running).position == len(LONG)
    after = wire.oracle("pycode").run(b"x", wire.trace("pycode", LONG).states[-1])
    assert answer.outputs["next_tokens"] == [after.logits[-1].argmax()]


def test_opening_by_a_unary_call_takes_over_for_nobody(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream)
    session.step([1])
    opened = wire.open(session.model, [session.id])
    assert (list(opened.created), list(opened.positions), list(opened.epochs)) == ([False], [1], [2])
    assert stream.loss().reason == "SESSION_MOVED"
    expect(session.refuse_handle(session.handle, [1]), "SESSION_MOVED")
    assert not wire.sessions.GetSession(pb.GetSessionRequest(session_id=session.id)).session.attached
    session.attach(stream.open(session.model, session.id))
    session.step([2])


def test_reading_calls_take_nothing_over(wire: Wire, session: Follower) -> None:
    get = pb.GetSessionRequest(session_id=session.id)
    assert wire.sessions.GetSession(get).session.attached
    listed = wire.sessions.ListSessions(pb.ListSessionsRequest(page_size=10_000))
    assert session.id in [one.id for one in listed.sessions]
    wire.state(session.id)
    fork = wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id))
    wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=fork.session_id))
    assert wire.step(session.id, [7]).position == session.position + 1
    session.consumed([7])
    generate = pb.GenerateRequest(session_id=session.id, max_tokens=2, temperature=0)
    for message in wire.sessions.Generate(generate):
        session.consumed(message.tokens)
    session.step([8])
    assert wire.sessions.GetSession(get).session.epoch == 1
    assert not session.stream.lost_handles


def test_a_stream_that_ends_leaves_its_sessions_open_and_attachable(wire: Wire, stream: RawStream) -> None:
    first = wire.stream()
    session = Follower(wire, first)
    session.step([1, 2])
    first.finish()
    opened = stream.open(session.model, session.id, "ATTACH")
    assert (opened.created, opened.position) == (False, 2)
    session.stream = stream
    session.attach(opened)
    session.step([3])


def test_attaching_with_another_model_is_refused(wire: Wire, stream: RawStream, session: Follower) -> None:
    for mode in ("ATTACH", "ATTACH_OR_CREATE", "CREATE"):
        command, [request] = stream.opening("tiny-lstm", [session.id], mode)
        stream.send(command)
        expect(stream.refusal(request), "SESSION_EXISTS")
    assert not stream.lost_handles
