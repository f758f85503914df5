"""A unary call that carries a request id is done once, however often it is sent."""

from collections.abc import Callable
from typing import Any

import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.refusals import expect, of_call
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")


def total_size(wire: Wire) -> int:
    return wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size


def get(wire: Wire, session_id: str) -> pb.Session:
    return wire.sessions.GetSession(pb.GetSessionRequest(session_id=session_id)).session


def test_a_repeated_open_makes_no_more_sessions(wire: Wire) -> None:
    first = wire.open("tiny-gru", 5, request_id="open-1")
    before = total_size(wire)
    wire.step(first.session_ids[0], [1])
    assert wire.open("tiny-gru", 5, request_id="open-1") == first
    assert total_size(wire) == before
    assert get(wire, first.session_ids[0]).epoch == 1


def test_a_repeated_attach_begins_no_further_epoch(wire: Wire) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    for _ in range(3):
        again = wire.open("tiny-gru", [session_id], "ATTACH", request_id="attach-1")
        assert list(again.epochs) == [2]
    assert get(wire, session_id).epoch == 2


def test_a_repeated_create_is_not_refused_as_existing(wire: Wire) -> None:
    for _ in range(2):
        assert list(wire.open("tiny-gru", ["once"], "CREATE", request_id="create-1").created) == [True]
    expect(of_call(lambda: wire.open("tiny-gru", ["once"], "CREATE", request_id="create-2")), "SESSION_EXISTS")


def test_a_repeated_reset_wipes_nothing_that_came_after_it(wire: Wire) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    wire.step(session_id, [1, 2])
    request = pb.ResetSessionRequest(session_id=session_id, request_id="reset-1")
    assert wire.sessions.ResetSession(request).epoch == 2
    wire.step(session_id, [3])
    with wire.unmoved(session_id):
        assert wire.sessions.ResetSession(request).epoch == 2


def test_a_repeated_fork_makes_one_copy(wire: Wire) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    request = pb.ForkSessionRequest(session_id=session_id, request_id="fork-1")
    first = wire.sessions.ForkSession(request)
    wire.step(session_id, [1])
    assert wire.sessions.ForkSession(request) == first
    wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=first.session_id))


def test_a_repeated_close_tells_the_position_again(wire: Wire) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    wire.step(session_id, [1, 2])
    request = pb.CloseSessionRequest(session_id=session_id, request_id="close-1")
    for _ in range(2):
        assert wire.sessions.CloseSession(request).position == 2
    expect(of_call(lambda: wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session_id))), "SESSION_CLOSED")


def test_a_repeated_import_replaces_nothing_again(wire: Wire) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    request = pb.ImportSessionRequest(session_id=session_id, state=wire.state(session_id), request_id="import-1")
    first = wire.sessions.ImportSession(request)
    wire.step(session_id, [1, 2])
    with wire.unmoved(session_id):
        assert wire.sessions.ImportSession(request) == first


def test_calls_made_at_the_same_moment_are_one(wire: Wire) -> None:
    before = total_size(wire)
    request = pb.OpenSessionsRequest(model="tiny-gru", count=3, request_id="at-once")
    calls = [wire.sessions.OpenSessions.future(request, timeout=30) for _ in range(10)]
    answers = {tuple(call.result().session_ids) for call in calls}
    assert len(answers) == 1
    assert total_size(wire) == before + 3
    for session_id in answers.pop():
        wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session_id))


OTHERS: dict[str, Callable[[Wire, str, str], object]] = {
    "another session": lambda wire, session_id, key: wire.sessions.ResetSession(
        pb.ResetSessionRequest(session_id="another", request_id=key)
    ),
    "another call": lambda wire, session_id, key: wire.sessions.CloseSession(
        pb.CloseSessionRequest(session_id=session_id, request_id=key)
    ),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_a_request_id_used_for_something_else_is_refused(
    wire: Wire, session: Follower, call: Callable[[Wire, str, str], object]
) -> None:
    other = wire.open("tiny-gru").session_ids[0]
    key = f"used-{other}"
    wire.sessions.ResetSession(pb.ResetSessionRequest(session_id=other, request_id=key))
    expect(of_call(lambda: call(wire, other, key)), "INVALID_INPUT", field="request_id")
    assert get(wire, other).epoch == 2


def test_a_refused_call_is_not_remembered(wire: Wire) -> None:
    def reset() -> Any:
        return wire.sessions.ResetSession(pb.ResetSessionRequest(session_id="later", request_id="try-again"))

    expect(of_call(reset), "SESSION_NOT_FOUND", field="session_id")
    wire.open("tiny-gru", ["later"])
    assert reset().epoch == 2


def test_request_ids_are_bounded(wire: Wire) -> None:
    longest = "x" * 128
    assert wire.open("tiny-gru", request_id=longest) == wire.open("tiny-gru", request_id=longest)
    expect(of_call(lambda: wire.open("tiny-gru", request_id=longest + "x")), "INVALID_INPUT", field="request_id")


def test_calls_without_a_request_id_are_done_each_time(wire: Wire) -> None:
    assert wire.open("tiny-gru").session_ids != wire.open("tiny-gru").session_ids
