"""Values at the edge of their ranges are answered, and the engine goes on."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import AcknowledgeCommand, CancelCommand, Command
from tests.support.generating import generate
from tests.support.refusals import expect
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")

FAR = 2**62


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 12},
        {"top_k": 2**32 - 1},
        {"temperature": 1e-45},
        {"temperature": 3e38},
        {"top_p": 1e-45},
        {"top_k": 3, "top_p": 0.5, "temperature": 1e-30},
        {"seed": 2**64 - 1},
        {"stop_tokens": list(range(11)) * 20},
    ],
    ids=str,
)
def test_sampling_settings_at_their_bounds(session: Follower, settings: dict[str, Any]) -> None:
    result = generate(session, **({"seed": 0, "max_tokens": 5} | settings))
    assert len(result.tokens) == (1 if "stop_tokens" in settings else 5)
    assert all(token < 11 for token in result.tokens)
    session.consumed(result.tokens)
    session.check()


def test_huge_vectors_trouble_nobody_else(wire: Wire, stream: RawStream) -> None:
    loud, calm = stream.open("vectors-gru"), Follower(wire, stream, "vectors-gru")
    ones = np.ones((3, 3), np.float32)
    for _ in range(3):
        requests = stream.run([loud.handle, calm.handle], [3.4e38 * ones, ones], outputs(states=True))
        stream.answer(requests[0])
        calm.take(ones, requests[1])


def test_a_session_may_stand_very_far_on(wire: Wire, session: Follower) -> None:
    state = wire.state(session.id)
    state.position = FAR - 5
    head = struct.pack("<QII", state.position, state.num_layers, state.state_size)
    state.checksum = zlib.crc32(state.model_fingerprint + head + state.values)
    stream = session.stream
    opened = stream.open(session.model, states=[state.SerializeToString()], mode="CREATE")
    assert opened.position == FAR - 5
    assert stream.step(opened.handle, [1, 2], outputs(states=True), position=FAR - 5).position == FAR - 3
    expect(stream.refuse(opened.handle, [1], position=FAR - 2), "POSITION_GAP", position=FAR - 3)
    assert stream.step(opened.handle, [1, 2], outputs(states=True), position=FAR - 5).position == FAR - 3


def test_request_numbers_use_all_their_bits(session: Follower) -> None:
    stream = session.stream
    command, _ = stream.running([session.handle], [[1]], outputs(states=True))
    command.run.requests[0] = stream.adopt_request(2**64 - 1, 1, outputs(states=True))
    stream.send(command)
    session.take([1], 2**64 - 1)


def test_commands_without_an_answer_may_name_anything(session: Follower) -> None:
    stream = session.stream
    stream.send(
        Command(cancel=CancelCommand()),
        Command(cancel=CancelCommand(runs=[0, 2**64 - 1, 7])),
        Command(acknowledge=AcknowledgeCommand()),
        Command(acknowledge=AcknowledgeCommand(handles=[0, 2**64 - 1], positions=[0, FAR])),
        Command(acknowledge=AcknowledgeCommand(handles=[session.handle] * 3, positions=[1, 2, 0])),
    )
    session.step([5])
    stream.send(Command(acknowledge=AcknowledgeCommand(handles=[session.handle], positions=[2**64 - 1])))
    expect(stream.refusal(0), "INVALID_INPUT")


def test_one_frame_may_hold_a_thousand_runs_of_a_session(session: Follower) -> None:
    runs = [[place % 11] for place in range(1000)]
    positions = range(session.position, session.position + 1000)
    wanted = outputs("every", next_token=True)
    requests = session.stream.run([session.handle] * 1000, runs, wanted, positions=positions)
    answers = [session.stream.answer(request) for request in requests]
    assert [answer.position for answer in answers] == [position + 1 for position in positions]
    session.consumed([token for run in runs for token in run])
    session.check()
