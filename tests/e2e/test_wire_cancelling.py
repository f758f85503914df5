"""Whole or not at all: cancellation, timeouts and lost connections count until a run's first token."""

import grpc
import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.refusals import Refused, expect, of_call
from tests.support.stream import Answer, RawStream, outputs
from tests.support.wire import LONG, Follower, Wire, state_values, step_request

pytestmark = pytest.mark.usefixtures("witnesses")

TOKENS = outputs("every", next_token=True)


@pytest.fixture
def busy(wire: Wire, stream: RawStream) -> "Busy":
    """A session in the midst of a long run, with room behind it."""
    return Busy(wire, stream)


class Busy:
    def __init__(self, wire: Wire, stream: RawStream) -> None:
        self.wire, self.stream = wire, stream
        session = stream.open("pycode")
        self.id, self.handle = session.session_id, session.handle
        [self.run] = stream.run([self.handle], [LONG], TOKENS, positions=[0])
        stream.begun(self.run)

    def queue(self, *runs: bytes, **more: list[int]) -> list[int]:
        """Runs behind the one under way."""
        lengths = [len(LONG), *map(len, runs)]
        positions = np.cumsum(lengths)[: len(runs)]
        return self.stream.run([self.handle] * len(runs), runs, TOKENS, positions=positions, **more)

    def check(self, *consumed: bytes) -> None:
        """The long run has finished whole, and of the others these have run."""
        assert self.stream.answer(self.run).num_tokens == len(LONG)
        state = self.wire.state(self.id)
        assert state.position == len(LONG) + sum(map(len, consumed))
        expected = self.wire.trace("pycode", LONG).states[-1]
        if consumed:
            expected = self.wire.oracle("pycode").run(b"".join(consumed), expected).states[-1]
        np.testing.assert_allclose(state_values(state), expected, rtol=0, atol=2e-5)


def test_a_queued_run_that_is_cancelled_has_not_run_and_later_ones_are_gaps(busy: Busy) -> None:
    first, second, third = busy.queue(b"ab", b"cd", b"e")
    busy.stream.cancel(second)
    expect(busy.stream.refusal(second), "RUN_CANCELLED")
    expect(busy.stream.refusal(third), "POSITION_GAP", position=len(LONG) + 2)
    assert busy.stream.answer(first).position == len(LONG) + 2
    # What was withdrawn can be sent again from there.
    [again] = busy.stream.run([busy.handle], [b"cd"], TOKENS, positions=[len(LONG) + 2])
    assert busy.stream.answer(again).position == len(LONG) + 4
    busy.check(b"ab", b"cd")


def test_a_run_that_has_begun_finishes_whatever_is_cancelled(busy: Busy) -> None:
    busy.stream.cancel(busy.run)
    busy.check()


def test_cancelling_what_is_answered_or_unknown_does_nothing(session: Follower) -> None:
    stream = session.stream
    [request] = stream.run([session.handle], [[1]], outputs(states=True))
    session.take([1], request)
    stream.cancel(request, 10**9, 0)
    stream.cancel()
    session.step([2])


def test_the_runs_of_another_stream_cannot_be_cancelled(wire: Wire, busy: Busy) -> None:
    [queued] = busy.queue(b"ab")
    other = wire.stream()
    other.cancel(*range(queued + 10))
    other.finish()
    assert busy.stream.answer(queued).num_tokens == 2
    busy.check(b"ab")


def test_a_queued_run_whose_timeout_passes_has_not_run(busy: Busy) -> None:
    late, behind = busy.queue(b"ab", b"cd", timeouts_milliseconds=[1, 0])
    expect(busy.stream.refusal(late), "RUN_TIMED_OUT")
    expect(busy.stream.refusal(behind), "POSITION_GAP", position=len(LONG))
    busy.check()


def test_a_timeout_counts_until_the_first_token_alone(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    [run] = stream.run([session.handle], [LONG], TOKENS, timeouts_milliseconds=[200])
    assert stream.answer(run).num_tokens == len(LONG)


def test_a_timeout_that_does_not_pass_has_no_effect(session: Follower) -> None:
    wanted = outputs(states=True)
    [request] = session.stream.run([session.handle], [[1]], wanted, timeouts_milliseconds=[60_000])
    session.take([1], request)


def test_a_step_whose_deadline_passes_in_the_queue_has_not_run(wire: Wire, busy: Busy) -> None:
    request = step_request(busy.id, b"ab", TOKENS, len(LONG))
    refused = of_call(lambda: wire.sessions.Step(request, timeout=0.05))
    assert refused.code == "DEADLINE_EXCEEDED"
    busy.check()


def test_a_step_that_is_cancelled_in_the_queue_has_not_run(wire: Wire, busy: Busy) -> None:
    get = pb.GetSessionRequest(session_id=busy.id)
    call = wire.sessions.Step.future(step_request(busy.id, b"ab", TOKENS, len(LONG)))
    while (facts := wire.sessions.GetSession(get).session).position + facts.num_pending_tokens < len(LONG) + 2:
        pass  # the step is on its way still
    call.cancel()
    busy.check()


def test_a_step_whose_deadline_passes_under_way_has_run_whole_and_its_repeat_is_answered(
    wire: Wire, stream: RawStream
) -> None:
    session = stream.open("pycode")
    request = step_request(session.session_id, LONG, TOKENS, 0)
    refused = of_call(lambda: wire.sessions.Step(request, timeout=0.1))
    assert refused.code == "DEADLINE_EXCEEDED"
    again = wire.sessions.Step(request, timeout=30)
    assert again.position == len(LONG)
    assert wire.state(session.session_id).position == len(LONG)


def test_of_a_lost_stream_what_has_begun_finishes_and_the_rest_is_withdrawn(wire: Wire, stream: RawStream) -> None:
    lost = wire.stream()
    session = lost.open("pycode")
    running, *_ = lost.run([session.handle] * 3, [LONG, b"ab", b"c"], TOKENS, positions=[0, 2048, 2050])
    lost.begun(running)
    lost.cut()
    # The stream's end and the attach come over different streams: the attach may see the queued runs still.
    opened = stream.open("pycode", session.session_id, "ATTACH")
    assert opened.position in {2048, 2051}
    state = wire.state(session.session_id)
    assert state.position == 2048
    expected = wire.trace("pycode", LONG).states[-1]
    np.testing.assert_allclose(state_values(state), expected, rtol=0, atol=2e-5)


def test_half_closing_a_stream_answers_everything_and_ends_well(wire: Wire) -> None:
    busy, other = Busy(wire, wire.stream()), Follower(wire, wire.stream())
    queued = busy.queue(b"ab", b"cd")
    [run] = other.stream.run([other.handle], [[1, 2]], outputs(states=True))
    closing = other.stream.close_session(other.handle)
    assert other.stream.finish() is grpc.StatusCode.OK
    other.take([1, 2], run)
    assert other.stream.done(closing).handle == 0
    assert busy.stream.finish() is grpc.StatusCode.OK
    assert [busy.stream.answer(request).num_tokens for request in queued] == [2, 2]
    busy.check(b"ab", b"cd")


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_cancelled_a_session_has_consumed_the_runs_that_were_answered(
    wire: Wire, stream: RawStream, seed: int
) -> None:
    random = np.random.default_rng(seed)
    sessions = [Follower(wire, stream) for _ in range(4)]
    for _ in range(8):
        sent: list[tuple[Follower, list[int], int]] = []
        commands = []
        for session in sessions:
            position = session.position
            for _ in range(int(random.integers(1, 5))):
                run = random.integers(0, 11, int(random.integers(1, 80))).tolist()
                more = {"timeouts_milliseconds": [int(random.choice([0, 0, 1, 3]))]}
                command, [request] = stream.running(
                    [session.handle], [run], outputs(states=True), positions=[position], **more
                )
                position += len(run)
                commands.append(command)
                sent.append((session, run, request))
        stream.send(*commands)
        stream.cancel(*(request for _, _, request in sent if random.random() < 0.2))
        for session, run, request in sent:
            outcome = stream.outcome(request)
            if isinstance(outcome, Answer):
                session.check_answer(run, outcome)
            else:
                assert isinstance(outcome, Refused)
                assert outcome.reason in {"RUN_CANCELLED", "RUN_TIMED_OUT", "POSITION_GAP"}
    for session in sessions:
        session.check()
