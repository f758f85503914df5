"""A server at its limits refuses at once, with a retry delay, and goes on with what it has."""

import grpc
import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.model_service_pb2 import GetModelRequest
from tests.support.metrics import Metrics
from tests.support.refusals import expect, of_call
from tests.support.server import ServerProcess
from tests.support.stream import RawStream, outputs
from tests.support.wire import SMALL_WINDOW, Follower, Wire, step_request

pytestmark = pytest.mark.usefixtures("witnesses")

MAX_SESSIONS = 14  # the witnesses are two of them


@pytest.fixture
def server(small_server: ServerProcess) -> ServerProcess:
    return small_server


def test_the_limits_are_told(wire: Wire) -> None:
    limits = wire.models.GetModel(GetModelRequest(name="tiny-gru")).limits
    assert (limits.max_run_tokens, limits.max_session_pending_tokens) == (64, 100)
    assert (limits.max_message_bytes, limits.max_answer_bytes, limits.max_open_sessions) == (20_000, 4096, 10_000)


def test_opens_beyond_max_sessions_are_refused_until_one_ends(wire: Wire, stream: RawStream) -> None:
    command, requests = stream.opening("tiny-gru", 20)
    stream.send(command)
    opened = [stream.opened(request) for request in requests[: MAX_SESSIONS - 2]]
    for request in requests[MAX_SESSIONS - 2 :]:
        expect(stream.refusal(request), "SESSION_LIMIT")
    expect(of_call(lambda: wire.open("tiny-gru")), "SESSION_LIMIT")
    fork = pb.ForkSessionRequest(session_id=opened[0].session_id)
    expect(of_call(lambda: wire.sessions.ForkSession(fork)), "SESSION_LIMIT")
    # What exists can be attached.
    assert not stream.open("tiny-gru", opened[1].session_id).created
    stream.done(stream.close_session(opened[0].handle))
    assert stream.open("tiny-gru").created


def test_a_unary_open_beyond_max_sessions_creates_none(wire: Wire) -> None:
    count = wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size
    expect(of_call(lambda: wire.open("tiny-gru", MAX_SESSIONS)), "SESSION_LIMIT")
    assert wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size == count
    assert len(wire.open("tiny-gru", MAX_SESSIONS - count).session_ids) == MAX_SESSIONS - count


def test_a_run_over_the_servers_limit_is_refused(wire: Wire, session: Follower) -> None:
    expect(session.refuse([1] * 65), "INVALID_INPUT")
    with wire.unmoved(session.id):
        expect(of_call(lambda: wire.step(session.id, [1] * 65)), "INVALID_INPUT", field="tokens")
    session.step([1] * 64)


def test_a_session_with_too_many_tokens_waiting_is_refused_at_once(session: Follower) -> None:
    runs = [[1] * 64, [2] * 64, [3] * 36, [4]]
    positions = [3, 67, 67, 131]
    requests = session.stream.run([session.handle] * 4, runs, outputs(states=True), positions=positions)
    expect(session.stream.refusal(requests[1]), "QUEUE_FULL")
    expect(session.stream.refusal(requests[3]), "POSITION_GAP", position=103)
    session.take(runs[0], requests[0])
    session.take(runs[2], requests[2])
    # There is room again.
    session.step([2] * 64)


def test_a_server_with_too_many_tokens_waiting_is_refused_at_once(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(6)]
    handles = [session.handle for session in sessions]
    requests = stream.run(handles, [[place] * 60 for place in range(6)], outputs(states=True))
    for place, session in enumerate(sessions[:4]):
        session.take([place] * 60, requests[place])
    for place, session in enumerate(sessions[4:], 4):
        expect(stream.refusal(requests[place]), "QUEUE_FULL")
        session.check()
        session.step([place] * 60)


def test_a_step_on_a_session_with_too_many_tokens_waiting_is_refused_with_a_retry_delay(wire: Wire) -> None:
    # Runs whose answers nobody reads rest, and their tokens wait.
    slow = wire.other(SMALL_WINDOW).stream()
    opened = slow.open_many("pycode", 2)
    wanted = outputs("every", states=True)  # 2,048 bytes a token
    for one in opened:
        slow.run([one.handle] * 2, [b"a" * 64, b"b" * 36], wanted, positions=[0, 64])
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") > 32_768)
    request = step_request(opened[1].session_id, b"c" * 64, position=100)
    expect(of_call(lambda: wire.sessions.Step(request)), "QUEUE_FULL")
    get = pb.GetSessionRequest(session_id=opened[1].session_id)
    assert wire.sessions.GetSession(get).session.num_pending_tokens > 100 - 64
    slow.finish()
    assert wire.sessions.Step(request).position == 164


def test_answers_come_in_slices_under_the_limit(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    wanted = outputs(head_outputs=True)  # 1,024 bytes a token
    [request] = stream.run([session.handle], [bytes(range(64))], wanted)
    sizes = []
    while not stream.is_answered(request):
        sizes.append(stream.read())
    assert max(sizes) < 4096 + 256
    answer = stream.answer(request)
    assert answer.num_slices >= 16
    expected = wire.oracle("pycode").run(bytes(range(64))).logits[1:]
    np.testing.assert_allclose(answer.outputs["head_outputs"], expected, rtol=0, atol=1e-3)


def test_answers_of_many_sessions_come_in_frames_under_the_limit(wire: Wire, stream: RawStream) -> None:
    opened = [stream.open("pycode") for _ in range(8)]
    requests = stream.run([one.handle for one in opened], [b"a"] * 8, outputs("last", head_outputs=True))
    while not all(map(stream.is_answered, requests)):
        assert stream.read() < 4096 + 512
    expected = wire.oracle("pycode").run(b"a").logits[1:]
    for request in requests:
        found = stream.answer(request).outputs["head_outputs"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_outputs_too_large_for_an_answer_are_refused_before_running(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream, "pycode")
    session.step(b"ab")
    wanted = outputs(head_outputs=True, states=True, gates=True)  # 1,024 + 2,048 + 4,096 bytes a token
    for at in ("every", "last"):
        wanted.at = outputs(at).at
        expect(session.refuse(b"c", wanted), "OUTPUT_UNSUPPORTED")
        with wire.unmoved(session.id):
            refused = of_call(lambda: wire.step(session.id, b"c", wanted))
            expect(refused, "OUTPUT_UNSUPPORTED", field="outputs")
    session.step(b"c")


def test_a_step_whose_answer_is_too_large_is_refused_before_running(wire: Wire, session: Follower) -> None:
    request = step_request(session.id, [1] * 64, outputs(states=True, gates=True))  # 12,288 bytes
    with wire.unmoved(session.id):
        refused = of_call(lambda: wire.sessions.Step(request))
        expect(refused, "INVALID_INPUT", field="outputs")
    request.outputs.at = outputs("last").at
    assert wire.sessions.Step(request).position == session.position + 64
    session.consumed([1] * 64)


def test_an_answer_over_max_held_answer_bytes_is_not_held(session: Follower) -> None:
    tokens = [1] * 33  # of 64 bytes of state each: over 2,048
    session.step(tokens)
    refused = session.refuse(tokens, outputs(states=True), position=3)
    expect(refused, "ANSWER_NOT_HELD", position=36)
    session.step([2] * 32)
    assert session.stream.step(session.handle, [2] * 32, outputs(states=True), position=36).position == 68


def test_of_a_sessions_answers_the_newest_are_held(session: Follower) -> None:
    for token in range(6):
        session.step([token])
    wanted = outputs(states=True)
    for position in (5, 6, 7, 8):
        assert session.stream.step(session.handle, [position - 3], wanted, position=position).position == position + 1
    for position in (3, 4):
        refused = session.refuse([position - 3], wanted, position=position)
        expect(refused, "ANSWER_NOT_HELD", position=9)


def test_the_smaller_message_limit_ends_its_own_stream_too(wire: Wire) -> None:
    stream = wire.stream()
    session = Follower(wire, stream)
    session.step([1])
    stream.send_bytes(b"\0" * 20_001)
    assert stream.ending().code == "RESOURCE_EXHAUSTED"
    session.check()


def test_a_stream_of_nothing_but_refusals_is_answered_and_ends_well(wire: Wire) -> None:
    stream = wire.stream()
    requests = [stream.run([place], [[1]])[0] for place in range(200)]
    assert stream.finish() is grpc.StatusCode.OK
    for request in requests:
        expect(stream.refusal(request), "STALE_HANDLE")
