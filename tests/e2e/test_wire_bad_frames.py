"""Frames that are no frames, columns that do not fit each other, and messages that are too large."""

from typing import Any

import grpc
import pytest

from cellserve.v1.session_service_pb2 import StepRequest
from cellserve.v1.stream_pb2 import CloseCommand, Command, OpenCommand, ResetCommand, RunCommand
from tests.support.refusals import expect, of_call
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")

MAX_MESSAGE_BYTES = 4194304


@pytest.mark.parametrize(
    "frame",
    [b"\xff" * 50, b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"not protobuf at all", b"\x0a\x05abcde"],
    ids=["noise", "cut", "a false length", "text", "a false command"],
)
def test_a_frame_that_cannot_be_decoded_is_answered_in_band(wire: Wire, session: Follower, frame: bytes) -> None:
    with wire.unmoved(session.id):
        session.stream.send_bytes(frame)
        expect(session.stream.refusal(0), "INVALID_INPUT")


def test_a_command_of_an_unknown_kind_is_answered_in_band_and_its_neighbours_are_taken(session: Follower) -> None:
    stream = session.stream
    first, [before] = stream.running([session.handle], [[1]], outputs(states=True))
    last, [after] = stream.running([session.handle], [[2]], outputs(states=True), positions=[session.position + 1])
    unknown = Command.FromString(b"\xfa\x07\x00")  # field 127, of a later version of the contract
    stream.send(first, unknown, Command(), last)
    session.take([1], before)
    session.take([2], after)
    expect(stream.refusal(0), "INVALID_INPUT")
    expect(stream.refusal(0), "INVALID_INPUT")


def test_a_frame_without_commands_is_a_keepalive(wire: Wire) -> None:
    session = Follower(wire, wire.stream())
    session.stream.send()
    session.step([1])
    assert session.stream.finish() is grpc.StatusCode.OK


UNEQUAL: dict[str, dict[str, Any]] = {
    "handles": {"handles": [1]},
    "no handles": {"handles": []},
    "counts": {"counts": [1]},
    "too many counts": {"counts": [1, 1, 1]},
    "tokens": {"tokens": [1]},
    "too many tokens": {"tokens": [1, 2, 3]},
    "no tokens": {"tokens": []},
    "positions": {"positions": [3]},
    "timeouts": {"timeouts_milliseconds": [1, 2, 3]},
    "acknowledged positions": {"acknowledged_positions": [1]},
    "counts that wrap around": {"counts": [2**32 - 1, 3]},
}


@pytest.mark.parametrize("columns", UNEQUAL.values(), ids=UNEQUAL)
def test_a_command_with_unequal_columns_is_refused_whole(
    wire: Wire, stream: RawStream, session: Follower, columns: dict[str, Any]
) -> None:
    other = Follower(wire, stream)
    requests = stream.new_requests(2)
    good = {"requests": requests, "handles": [session.handle, other.handle], "tokens": [1, 2]}
    with wire.unmoved(session.id), wire.unmoved(other.id):
        stream.send(Command(run=RunCommand(**(good | columns))))
        for request in requests:
            expect(stream.refusal(request), "INVALID_INPUT")
    other.step([1])


def test_commands_without_rows_are_refused(session: Follower) -> None:
    stream = session.stream
    stream.send(
        Command(open=OpenCommand(model="tiny-gru")),
        Command(run=RunCommand(handles=[session.handle], tokens=[1])),
        Command(reset=ResetCommand(handles=[session.handle])),
        Command(close=CloseCommand(handles=[session.handle])),
    )
    for _ in range(4):
        expect(stream.refusal(0), "INVALID_INPUT")


def test_request_numbers_begin_at_one(session: Follower) -> None:
    run = RunCommand(requests=[0], handles=[session.handle], tokens=[1])
    session.stream.send(Command(run=run))
    expect(session.stream.refusal(0), "INVALID_INPUT")


def test_a_reset_with_unequal_columns_is_refused(session: Follower) -> None:
    requests = session.stream.new_requests(2)
    session.stream.send(Command(reset=ResetCommand(requests=requests, handles=[session.handle])))
    for request in requests:
        expect(session.stream.refusal(request), "INVALID_INPUT")


def test_an_oversize_message_ends_its_own_stream_and_none_of_its_runs_has_run(wire: Wire, stream: RawStream) -> None:
    doomed = wire.stream()
    sessions = [Follower(wire, doomed) for _ in range(3)]
    for session in sessions:
        session.step([1, 2])
    handles = [session.handle for session in sessions]
    number = MAX_MESSAGE_BYTES // 4 // 3000
    command, _ = doomed.running(handles * number, [[1] * 1000] * 3 * number)
    assert command.ByteSize() > MAX_MESSAGE_BYTES
    doomed.send(command)
    refused = doomed.ending()
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "")
    for session in sessions:
        session.check()
        opened = stream.open(session.model, session.id, "ATTACH")
        assert not opened.created
        session.stream = stream
        session.attach(opened)
        session.step([3])


def test_a_message_just_under_the_limit_is_taken(session: Follower) -> None:
    stream = session.stream
    command, requests = stream.running([session.handle] * 1000, [[1] * 1040] * 1000)
    assert MAX_MESSAGE_BYTES - 30_000 < command.ByteSize() < MAX_MESSAGE_BYTES
    stream.send(command)
    assert stream.answer(requests[0]).position == session.position + 1040
    session.consumed([1] * 1040)
    for request in requests[1:]:
        expect(stream.refusal(request), "INVALID_INPUT")  # a second run without a position


def test_an_oversize_unary_message_is_refused(wire: Wire, session: Follower) -> None:
    request = StepRequest(session_id=session.id)
    request.tokens.ids.extend([1] * (MAX_MESSAGE_BYTES // 4 + 1))
    with wire.unmoved(session.id):
        refused = of_call(lambda: wire.sessions.Step(request, timeout=30))
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "")


@pytest.mark.parametrize("method", ["Step", "OpenSessions", "ImportSession", "GetSession"])
def test_a_unary_request_that_cannot_be_decoded_is_refused(wire: Wire, method: str) -> None:
    expect(of_call(lambda: wire.raw_call(method, b"\xff" * 20)), "INVALID_INPUT")
    assert "Traceback" not in wire.server.log
