"""Sessions that never were, were closed or have expired, and handles that are stale."""

import time
from collections.abc import Callable
from functools import partial

import grpc
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.model_service_pb2 import GetModelRequest
from tests.support.refusals import expect, of_call, of_error
from tests.support.server import ServerProcess
from tests.support.stream import RawStream
from tests.support.wire import Follower, Wire, step_request

pytestmark = pytest.mark.usefixtures("witnesses")

UNARY: dict[str, Callable[[Wire, str], object]] = {
    "GetSession": lambda wire, key: wire.sessions.GetSession(pb.GetSessionRequest(session_id=key)),
    "ResetSession": lambda wire, key: wire.sessions.ResetSession(pb.ResetSessionRequest(session_id=key)),
    "ForkSession": lambda wire, key: wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=key)),
    "CloseSession": lambda wire, key: wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=key)),
    "ExportSession": lambda wire, key: wire.sessions.ExportSession(pb.ExportSessionRequest(session_id=key)),
    "ImportSession": lambda wire, key: wire.sessions.ImportSession(
        pb.ImportSessionRequest(session_id=key, state=wire.state(wire.open("tiny-gru").session_ids[0]))
    ),
    "Step": lambda wire, key: wire.sessions.Step(step_request(key, [1])),
    "Generate": lambda wire, key: wire.sessions.Generate(pb.GenerateRequest(session_id=key, max_tokens=1)),
    "OpenSessions": lambda wire, key: wire.open("tiny-gru", [key], "ATTACH"),
}


@pytest.mark.parametrize("call", UNARY.values(), ids=UNARY)
def test_a_session_that_never_was_is_not_found(wire: Wire, call: Callable[[Wire, str], object]) -> None:
    expect(of_call(lambda: call(wire, "never-was")), "SESSION_NOT_FOUND", field=_id_field(call))


@pytest.mark.parametrize("call", UNARY.values(), ids=UNARY)
def test_a_closed_session_is_told_from_one_that_never_was(
    wire: Wire, stream: RawStream, call: Callable[[Wire, str], object]
) -> None:
    closed = Follower(wire, stream)
    stream.done(stream.close_session(closed.handle))
    expect(of_call(lambda: call(wire, closed.id)), "SESSION_CLOSED", field=_id_field(call))


def _id_field(call: Callable[[Wire, str], object]) -> str:
    return "session_ids" if call is UNARY["OpenSessions"] else "session_id"


@pytest.mark.parametrize("call", [name for name in UNARY if name != "OpenSessions"])
def test_a_missing_id_is_invalid_input(wire: Wire, call: str) -> None:
    expect(of_call(lambda: UNARY[call](wire, "")), "INVALID_INPUT", field="session_id")


def test_attaching_on_a_stream_tells_unknown_from_closed(wire: Wire, stream: RawStream) -> None:
    closed = Follower(wire, stream)
    open_one = Follower(wire, stream)
    stream.done(stream.close_session(closed.handle))
    command, requests = stream.opening("tiny-gru", ["never-was", closed.id, open_one.id], "ATTACH")
    stream.send(command)
    expect(stream.refusal(requests[0]), "SESSION_NOT_FOUND")
    expect(stream.refusal(requests[1]), "SESSION_CLOSED")
    open_one.attach(stream.opened(requests[2]))
    open_one.step([1])


def test_an_id_that_was_closed_can_begin_anew(wire: Wire, stream: RawStream) -> None:
    old = Follower(wire, stream)
    old.step([1, 2, 3])
    stream.done(stream.close_session(old.handle))
    new = Follower(wire, stream, session_id=old.id, mode="CREATE")
    assert new.position == 0
    new.check()
    new.step([4])
    expect(stream.refuse(old.handle, [1]), "STALE_HANDLE")


def test_a_session_that_somebody_else_closed_is_told_to_its_stream(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream)
    session.step([1, 2])
    assert wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session.id)).position == 2
    lost = stream.loss()
    assert (lost.handle, lost.reason) == (session.handle, "SESSION_CLOSED")
    expect(stream.refuse(session.handle, [1]), "STALE_HANDLE")
    expect(stream.refusal(stream.close_session(session.handle)), "STALE_HANDLE")
    expect(stream.refusal(stream.reset(session.handle)), "STALE_HANDLE")


def test_a_close_waits_for_the_runs_before_it(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream)
    [run] = stream.run([session.handle], [[1] * 500])
    closing = stream.close_session(session.handle)
    assert stream.answer(run).position == 500
    assert stream.done(closing).handle == 0
    expect(stream.refuse(session.handle, [1]), "STALE_HANDLE")


def test_made_up_handles_are_stale(stream: RawStream) -> None:
    for handle in (0, 1, 2**32, 2**64 - 1, 0xDEADBEEF12345678):
        expect(stream.refuse(handle, [1]), "STALE_HANDLE")


def test_handles_near_a_valid_one_are_stale(session: Follower) -> None:
    for handle in (session.handle + 1, session.handle - 1, session.handle ^ (1 << 32), session.handle ^ (1 << 63)):
        expect(session.refuse_handle(handle, [1]), "STALE_HANDLE")


def test_a_handle_of_another_stream_is_stale(wire: Wire, session: Follower) -> None:
    thief = wire.stream()
    with wire.unmoved(session.id):
        expect(thief.refuse(session.handle, [1]), "STALE_HANDLE")
        expect(thief.refusal(thief.reset(session.handle)), "STALE_HANDLE")
        expect(thief.refusal(thief.close_session(session.handle)), "STALE_HANDLE")
        thief.acknowledge(session.handle, session.position)
        assert thief.finish() is grpc.StatusCode.OK


def test_a_handle_of_an_earlier_epoch_is_stale(session: Follower) -> None:
    stream, before = session.stream, session.handle
    opened = stream.open(session.model, session.id, "ATTACH")
    assert (opened.created, opened.position, opened.epoch) == (False, 3, 2)
    assert opened.handle != before
    session.attach(opened)
    expect(session.refuse_handle(before, [1]), "STALE_HANDLE")
    assert not stream.lost_handles


def test_a_reset_makes_the_handle_stale_and_tells_the_new_one(session: Follower) -> None:
    stream, before = session.stream, session.handle
    done = stream.done(stream.reset(before))
    assert done.epoch == 2
    session.restart(done.handle)
    expect(session.refuse_handle(before, [1]), "STALE_HANDLE")
    session.check()


def test_a_reset_by_a_unary_call_is_told_to_the_stream(wire: Wire, session: Follower) -> None:
    assert wire.sessions.ResetSession(pb.ResetSessionRequest(session_id=session.id)).epoch == 2
    lost = session.stream.loss()
    assert (lost.handle, lost.reason) == (session.handle, "STALE_HANDLE")
    expect(session.refuse_handle(session.handle, [1]), "STALE_HANDLE")
    opened = session.stream.open(session.model, session.id, "ATTACH")
    assert (opened.position, opened.epoch) == (0, 3)
    session.restart(opened.handle)


def test_an_unknown_model_is_not_found(wire: Wire, stream: RawStream) -> None:
    command, [request] = stream.opening("no-such-model")
    stream.send(command)
    expect(stream.refusal(request), "MODEL_NOT_FOUND")
    expect(of_call(lambda: wire.open("no-such-model")), "MODEL_NOT_FOUND", field="model")
    expect(of_call(lambda: wire.open("")), "MODEL_NOT_FOUND", field="model")
    expect(of_call(lambda: wire.models.GetModel(GetModelRequest(name="x"))), "MODEL_NOT_FOUND", field="name")
    expect(of_call(lambda: wire.models.GetModel(GetModelRequest())), "INVALID_INPUT", field="name")


def test_an_idle_session_expires_and_one_that_steps_does_not(expiring_server: ServerProcess) -> None:
    with Wire(expiring_server) as wire:
        stream = wire.stream()
        idle, busy = Follower(wire, stream), Follower(wire, stream)
        idle.step([1, 2])
        _wait_for(lambda: _status(wire, idle.id) != "OK", meanwhile=lambda: busy.step([1]))
        lost = stream.loss()
        assert (lost.handle, lost.reason) == (idle.handle, "SESSION_EXPIRED")
        expect(stream.refuse(idle.handle, [1]), "STALE_HANDLE")
        busy.step([2])
        for name, call in UNARY.items():
            if name != "ImportSession":  # it makes sessions of its own
                expect(of_call(partial(call, wire, idle.id)), "SESSION_EXPIRED")
        command, [request] = stream.opening("tiny-gru", [idle.id], "ATTACH")
        stream.send(command)
        expect(stream.refusal(request), "SESSION_EXPIRED")
        # The memory of ended sessions is bounded, too.
        _wait_for(lambda: _status(wire, idle.id) == "SESSION_NOT_FOUND", meanwhile=lambda: busy.step([3]))


def _status(wire: Wire, session_id: str) -> str:
    """The reason why there is no such session, or "OK"."""
    try:
        wire.sessions.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=30)
    except grpc.RpcError as error:
        return of_error(error).reason
    return "OK"


def _wait_for(condition: Callable[[], bool], meanwhile: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        meanwhile()
