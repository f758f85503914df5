"""Commands that meet each other on one session: what waits for a run, who comes first, and who is told what."""

from typing import Any

import grpc
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.stream_pb2 import Command, OpenMode, ResetCommand
from tests.support.generating import MANY, request_of
from tests.support.refusals import expect, of_error
from tests.support.stream import RawStream, outputs
from tests.support.wire import LONG, Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")

EVERY_TOKEN = outputs("every", next_token=True)


class Busy:
    """A session in the midst of a long run."""

    def __init__(self, wire: Wire, stream: RawStream) -> None:
        self.stream = stream
        opened = stream.open("pycode")
        self.id, self.handle = opened.session_id, opened.handle
        [self.run] = stream.run([self.handle], [LONG], EVERY_TOKEN, positions=[0])
        stream.begun(self.run)

    def finished(self) -> bool:
        return self.stream.answer(self.run).num_tokens == len(LONG)


@pytest.fixture
def busy(wire: Wire, stream: RawStream) -> Busy:
    return Busy(wire, stream)


def test_an_attach_waits_for_an_export_that_waits_for_a_run(wire: Wire, busy: Busy) -> None:
    # Whichever of the two comes first, both wait for the run.
    exporting = wire.sessions.ExportSession.future(pb.ExportSessionRequest(session_id=busy.id), timeout=30)
    other = wire.stream()
    opened = other.open("pycode", busy.id, "ATTACH")
    assert exporting.result().state.position == opened.position == len(LONG)
    assert busy.finished()
    assert busy.stream.loss().reason == "SESSION_MOVED"
    assert other.step(opened.handle, b"x").position == len(LONG) + 1


def test_of_two_attaches_at_once_the_later_one_holds_the_session(wire: Wire, session: Follower) -> None:
    call = wire.sessions.Generate(request_of(session, max_tokens=MANY), timeout=60)
    next(call)
    streams = [wire.stream(), wire.stream()]
    sent = []
    for stream in streams:
        command, [request] = stream.opening(session.model, [session.id], "ATTACH")
        stream.send(command)
        sent.append(request)
    opened = [stream.opened(request) for stream, request in zip(streams, sent, strict=True)]
    holder = max((0, 1), key=lambda place: opened[place].epoch)
    assert sorted(one.epoch for one in opened) == [2, 3]
    assert streams[1 - holder].loss().reason == "SESSION_MOVED"
    answer = streams[holder].step(opened[holder].handle, [1], outputs(states=True))
    assert answer.position == opened[holder].position + 1
    with pytest.raises(grpc.RpcError) as broken_off:
        list(call)
    assert of_error(broken_off.value).reason == "SESSION_MOVED"
    session.stream = streams[holder]
    session.restart(streams[holder].done(streams[holder].reset(opened[holder].handle)).handle)


def test_a_close_waits_and_meanwhile_nothing_new_is_taken(wire: Wire, busy: Busy) -> None:
    closing = busy.stream.close_session(busy.handle)
    expect(busy.stream.refuse(busy.handle, b"x"), "STALE_HANDLE")
    assert busy.finished()
    assert busy.stream.done(closing).handle == 0
    with pytest.raises(grpc.RpcError) as gone:
        wire.step(busy.id, b"x")
    expect(of_error(gone.value), "SESSION_CLOSED", field="session_id")


def test_what_waits_behind_a_close_is_told_that_the_session_is_closed(wire: Wire, busy: Busy) -> None:
    closing = busy.stream.close_session(busy.handle)
    expect(busy.stream.refuse(busy.handle, b"x"), "STALE_HANDLE")  # the close has been taken
    attaching = pb.OpenSessionsRequest(model="pycode", session_ids=[busy.id], mode=OpenMode.OPEN_MODE_ATTACH)
    waiting: list[Any] = [
        wire.sessions.ExportSession.future(pb.ExportSessionRequest(session_id=busy.id), timeout=30),
        wire.sessions.ForkSession.future(pb.ForkSessionRequest(session_id=busy.id), timeout=30),
        wire.sessions.ResetSession.future(pb.ResetSessionRequest(session_id=busy.id), timeout=30),
        wire.sessions.CloseSession.future(pb.CloseSessionRequest(session_id=busy.id), timeout=30),
        wire.sessions.OpenSessions.future(attaching, timeout=30),
    ]
    for call in waiting:
        error = call.exception()
        assert isinstance(error, grpc.RpcError)
        expect(of_error(error), "SESSION_CLOSED")
    # The id is free at once, while the closed session finishes.
    fresh = busy.stream.open("pycode", busy.id)
    assert (fresh.created, fresh.position) == (True, 0)
    assert busy.stream.step(fresh.handle, b"x").position == 1
    busy.stream.done(closing)
    assert busy.finished()


def test_closing_or_resetting_twice_in_a_command_is_done_once(stream: RawStream) -> None:
    opened = stream.open("tiny-gru")
    stream.step(opened.handle, [1, 2])
    requests = stream.new_requests(2)
    stream.send(Command(reset=ResetCommand(requests=requests, handles=[opened.handle] * 2)))
    handle = stream.done(requests[0]).handle
    expect(stream.refusal(requests[1]), "STALE_HANDLE")
    stream.step(handle, [3], position=0)
    first, second = stream.close_sessions([handle, handle])
    stream.done(first)
    expect(stream.refusal(second), "STALE_HANDLE")


def test_a_reset_and_the_runs_after_it_follow_a_run_under_way(wire: Wire, busy: Busy) -> None:
    [queued] = busy.stream.run([busy.handle], [b"xy"], EVERY_TOKEN, positions=[len(LONG)])
    resetting = busy.stream.reset(busy.handle)
    expect(busy.stream.refuse(busy.handle, b"x"), "STALE_HANDLE")  # the reset has been taken
    after = wire.sessions.Step.future(step_of(busy.id, b"import", 0), timeout=30)
    assert busy.finished()
    assert busy.stream.answer(queued).position == len(LONG) + 2
    handle = busy.stream.done(resetting).handle
    assert after.result().position == 6
    answer = busy.stream.step(handle, b" ", outputs(head_outputs=True), position=6)
    expected = wire.oracle("pycode").run(b"import ").logits[-1]
    assert abs(answer.outputs["head_outputs"][0] - expected).max() < 1e-3


def step_of(session_id: str, tokens: bytes, position: int) -> pb.StepRequest:
    return pb.StepRequest(session_id=session_id, position=position, tokens=pb.TokenColumn(ids=tokens))


def test_a_lost_stream_leaves_its_waiting_reset_done(wire: Wire, stream: RawStream) -> None:
    lost = wire.stream()
    busy = Busy(wire, lost)
    lost.reset(busy.handle)
    lost.cut()
    opened = stream.open("pycode", busy.id, "ATTACH")
    assert opened.position in {0, len(LONG)}
    # The stream's end may have come before its reset.
    assert wire.state(busy.id).position == opened.position


def test_a_session_that_is_closed_while_it_generates_is_gone_for_its_stream_too(wire: Wire, session: Follower) -> None:
    other = Follower(wire, session.stream)
    other.step([1])
    call = wire.sessions.Generate(request_of(other, max_tokens=MANY), timeout=60)
    next(call)
    session.stream.done(session.stream.close_session(other.handle))
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert of_error(ended.value).reason == "SESSION_CLOSED"
    expect(session.stream.refuse(other.handle, [1]), "STALE_HANDLE")
