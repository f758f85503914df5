"""Runs that the model cannot take: each is refused whole, and its session, stream and neighbours go on."""

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import Command, RunCommand
from cellserve.v1.values_pb2 import FloatBlock, OutputRequest
from tests.support.refusals import expect
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")

VECTOR_MODEL = "vectors-gru"  # 3 numbers in


@pytest.fixture
def vector_session(wire: Wire, stream: RawStream) -> Follower:
    session = Follower(wire, stream, VECTOR_MODEL)
    session.step(np.ones((2, 3)))
    return session


@pytest.mark.parametrize("tokens", [[11], [11, 1, 2], [1, 2, 11], [1, 2**32 - 1, 2]])
def test_a_run_with_a_token_out_of_range_is_refused_whole(session: Follower, tokens: list[int]) -> None:
    expect(session.refuse(tokens), "INVALID_INPUT")


def test_an_empty_run_is_refused(session: Follower) -> None:
    expect(session.refuse([]), "INVALID_INPUT")


def test_a_run_over_the_limit_is_refused_and_one_at_the_limit_runs(session: Follower) -> None:
    expect(session.refuse([1] * 4097), "INVALID_INPUT")
    assert session.stream.step(session.handle, [1] * 4096).position == 3 + 4096
    session.consumed([1] * 4096)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_vectors_of_another_width_are_refused(vector_session: Follower, width: int) -> None:
    expect(vector_session.refuse(np.zeros((2, width))), "INVALID_INPUT")
    vector_session.step(np.zeros((2, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7])
def test_a_vector_that_is_not_finite_is_refused(vector_session: Follower, value: float, place: int) -> None:
    vectors = np.ones((3, 3))
    vectors.flat[place] = value
    expect(vector_session.refuse(vectors), "INVALID_INPUT")
    vector_session.step(np.zeros((2, 3)))


def test_tokens_and_vectors_are_not_mistaken_for_each_other(session: Follower, vector_session: Follower) -> None:
    expect(session.refuse(np.zeros((2, 3))), "INVALID_INPUT")
    expect(vector_session.refuse([1, 2]), "INVALID_INPUT")
    vector_session.step(np.zeros((2, 3)))


@pytest.mark.parametrize(
    "block",
    [
        FloatBlock(shape=[2, 3], values=b"\0" * 20),
        FloatBlock(shape=[2, 3], values=b"\0" * 25),
        FloatBlock(shape=[6], values=b"\0" * 24),
        FloatBlock(shape=[1, 2, 3], values=b"\0" * 24),
        FloatBlock(shape=[], values=b"\0" * 24),
        FloatBlock(shape=[3, 3], values=b"\0" * 36),
        FloatBlock(shape=[2**32 - 1, 2**32 - 1], values=b"\0" * 24),
    ],
    ids=["short", "ragged", "flat", "deep", "shapeless", "a vector too many", "vast"],
)
def test_a_block_of_vectors_whose_shape_does_not_fit_is_refused(
    wire: Wire, vector_session: Follower, block: FloatBlock
) -> None:
    stream = vector_session.stream
    [request] = stream.new_requests(1)
    with wire.unmoved(vector_session.id):
        run = RunCommand(requests=[request], handles=[vector_session.handle], counts=[2], vectors=block)
        stream.send(Command(run=run))
        expect(stream.refusal(request), "INVALID_INPUT")
    vector_session.step(np.zeros((2, 3)))


@pytest.mark.parametrize("top_k", [12, 1025, 2**32 - 1])
def test_more_of_the_likeliest_tokens_than_there_are_is_refused(session: Follower, top_k: int) -> None:
    expect(session.refuse([1], outputs("last", top_k=top_k)), "INVALID_INPUT")


def test_outputs_at_an_unknown_place_are_refused(session: Follower) -> None:
    expect(session.refuse([1], OutputRequest(at=9, states=True)), "INVALID_INPUT")  # type: ignore[arg-type]


def test_a_position_beyond_all_bounds_is_refused(session: Follower) -> None:
    expect(session.refuse([1], position=2**64 - 1), "INVALID_INPUT")


def test_bad_rows_are_refused_and_the_good_rows_of_their_frame_run(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(6)]
    runs = [[1, 2], [11], [3], [], [4, 5, 6], [7, 8, 99]]
    requests = stream.run([session.handle for session in sessions], runs, outputs(states=True))
    for session, run, request in zip(sessions, runs, requests, strict=True):
        if session in sessions[1::2]:
            expect(stream.refusal(request), "INVALID_INPUT")
            session.check()
        else:
            session.take(run, request)
        session.step([9])


def test_rows_of_several_models_in_one_command_are_refused(wire: Wire, stream: RawStream, session: Follower) -> None:
    other = Follower(wire, stream, "tiny-lstm")
    requests = stream.run([session.handle, other.handle], [[1], [1]], outputs(states=True))
    session.take([1], requests[0])
    expect(stream.refusal(requests[1]), "INVALID_INPUT")
    other.step([1])


def test_a_second_unanswered_run_needs_positions(session: Follower) -> None:
    requests = session.stream.run([session.handle] * 2, [[1, 2], [3]], outputs(states=True))
    session.take([1, 2], requests[0])
    expect(session.stream.refusal(requests[1]), "INVALID_INPUT")
