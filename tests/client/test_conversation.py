"""Requests and answers of one stream, frame by frame, against what the contract says about them."""

import asyncio
import math
from array import array

import numpy as np
import pytest

from cellserve import columns as byte_columns
from cellserve._blocks import Block, ResultBuffer
from cellserve._conversation import Conversation
from cellserve._deadline import Timeout
from cellserve._info import ServerLimits
from cellserve._ledger import Ledger
from cellserve._outbox import OpenKey
from cellserve._outputs import OutputSpec
from cellserve._runs import Run
from cellserve._unanswered import ProtocolError
from cellserve.errors import (
    AnswerNotHeld,
    CellserveError,
    ConnectionLost,
    InvalidInput,
    PositionGap,
    SessionClosed,
    SessionNotFound,
    StaleHandle,
    TimedOut,
)
from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import (
    AnswerEvent,
    Command,
    DoneEvent,
    DrainingEvent,
    Durability,
    DurableEvent,
    EndedEvent,
    Event,
    FailureEvent,
    OpenedEvent,
    OpenMode,
    StreamRequest,
    StreamResponse,
)
from cellserve.v1.values_pb2 import OutputAt, OutputColumns, OutputRequest

EVERY = OutputRequest(at=OutputAt.OUTPUT_AT_EVERY, next_token=True).SerializeToString()
LAST = OutputRequest(at=OutputAt.OUTPUT_AT_LAST, next_token=True).SerializeToString()
LIMITS = ServerLimits(
    max_run_tokens=100,
    max_session_pending_tokens=200,
    max_message_bytes=65536,
    max_open_sessions=100,
    max_held_answers=64,
    max_held_answer_bytes=65536,
)
HOLDER = 2**63 + 1
LATER = 1e9
MINUTE = Timeout(60)


class Stream:
    """A conversation, with the server's part written by hand."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []
        self.conversation = Conversation(LIMITS, lambda: None, self.on_deadline)
        self.every = OutputSpec(at="every", encoded=EVERY, top_k=0, gate_names=(), takes_vectors=False)
        self.last = OutputSpec(at="last", encoded=LAST, top_k=0, gate_names=(), takes_vectors=False)

    def on_deadline(self, deadline: float) -> None:
        self.deadlines.append(deadline)
        self.conversation.next_deadline = deadline

    def session(self, handle: int, position: int = 0) -> Ledger:
        ledger = Ledger(f"session-{handle}")
        self.conversation.hold(ledger, handle, 1, position)
        return ledger

    def run(self, ledger: Ledger, token: int = 1, *, spec: OutputSpec | None = None, deadline: float = math.inf) -> Run:
        assert ledger.handle is not None
        return self.conversation.send_run(ledger, ledger.handle, spec or self.every, token, 1, MINUTE, deadline)

    def block(self, ledgers: list[Ledger], counts: list[int], spec: OutputSpec, *, deadline: float = math.inf) -> Block:
        column = np.arange(sum(counts), dtype=np.uint32)
        buffer = ResultBuffer(np.array(counts), spec)
        members = np.arange(len(ledgers))
        return self.conversation.send_block(
            ledgers, members, spec, column, None, np.array(counts), MINUTE, deadline, buffer
        )

    def sent(self) -> list[Command]:
        frames = self.conversation.take_frames()
        return [command for frame in frames for command in StreamRequest.FromString(frame).commands]

    def says(self, *events: Event) -> None:
        frame = StreamResponse(events=events).SerializeToString()
        self.conversation.receive(byte_columns.StreamResponse.FromString(frame))

    def answers(self, answers: dict[int, int], tokens: list[int], **columns: list[int]) -> None:
        """Answers, as position by request."""
        self.says(
            Event(
                answers=AnswerEvent(
                    requests=list(answers),
                    positions=list(answers.values()),
                    outputs=OutputColumns(next_tokens=tokens),
                    **columns,
                )
            )
        )

    def refuses(self, request: int, reason: ErrorReason.ValueType, code: int, position: int = 0) -> None:
        self.says(
            Event(
                failures=FailureEvent(
                    requests=[request],
                    codes=[code],
                    reasons=[reason],
                    positions=[position],
                    retry_after_milliseconds=[0],
                    messages=["no"],
                )
            )
        )


@pytest.fixture
async def stream() -> Stream:
    return Stream()


def next_tokens(run: Run) -> list[int]:
    next_token = run.answer.result().next_token
    assert next_token is not None
    values: list[int] = next_token.tolist()
    return values


async def test_runs_carry_their_positions_and_what_has_been_received(stream: Stream) -> None:
    one, two = stream.session(7, position=40), stream.session(8)
    runs = [stream.run(one), stream.run(two), stream.run(one)]
    (command,) = stream.sent()
    assert list(command.run.handles) == [7, 8, 7]
    assert list(command.run.positions) == [40, 0, 41]
    assert list(command.run.acknowledged_positions) == [40, 0, 40]
    assert list(command.run.timeouts_milliseconds) == [60000] * 3
    assert list(command.run.requests) == [run.request for run in runs]
    stream.answers({runs[0].request: 41}, [5])
    stream.run(one)
    (command,) = stream.sent()
    assert (list(command.run.positions), list(command.run.acknowledged_positions)) == ([42], [41])


async def test_each_row_of_an_answer_goes_to_its_run_in_whatever_order(stream: Stream) -> None:
    runs = [stream.run(stream.session(handle)) for handle in (1, 2, 3)]
    stream.answers({runs[2].request: 1, runs[0].request: 1}, [30, 10])
    assert next_tokens(runs[2]) == [30]
    assert next_tokens(runs[0]) == [10]
    assert not runs[1].answer.done()


async def test_a_long_run_that_is_answered_in_slices_is_answered_once(stream: Stream) -> None:
    long, short = stream.run(stream.session(1)), stream.run(stream.session(2))
    stream.answers({long.request: 2, short.request: 1}, [1, 2, 9], counts=[2, 1], remaining=[3, 0])
    assert not long.answer.done()
    assert long.ledger.position == 0  # not before the whole of it has come: it may have to be asked for again
    assert next_tokens(short) == [9]
    stream.answers({long.request: 4}, [3, 4], counts=[2], remaining=[1])
    stream.answers({long.request: 5}, [5])
    assert next_tokens(long) == [1, 2, 3, 4, 5]
    assert long.ledger.position == 5


async def test_slices_of_a_run_that_asked_for_the_last_token_bring_no_rows_but_the_last(stream: Stream) -> None:
    long = stream.run(stream.session(1), spec=stream.last)
    other = stream.run(stream.session(2), spec=stream.last)
    stream.answers({long.request: 2, other.request: 4}, [9], counts=[2, 4], remaining=[1, 0])
    assert next_tokens(other) == [9]
    stream.answers({long.request: 3}, [7])
    assert next_tokens(long) == [7]


async def test_a_refusal_concerns_its_own_row_alone(stream: Stream) -> None:
    good, bad = stream.run(stream.session(1)), stream.run(stream.session(2), 300)
    stream.refuses(bad.request, ErrorReason.ERROR_REASON_INVALID_INPUT, 3)
    stream.answers({good.request: 1}, [5])
    error = bad.answer.exception()
    assert isinstance(error, InvalidInput)
    assert error.session_id == "session-2"
    assert next_tokens(good) == [5]
    assert bad.ledger.ready


async def test_a_run_nobody_waits_for_is_withdrawn_and_its_session_settles(stream: Stream) -> None:
    ledger = stream.session(1)
    run = stream.run(ledger)
    stream.sent()
    run.answer.cancel()
    stream.conversation.give_up(run)
    (command,) = stream.sent()
    assert list(command.cancel.runs) == [run.request]
    assert not ledger.ready
    stream.refuses(run.request, ErrorReason.ERROR_REASON_RUN_CANCELLED, 1)
    assert (ledger.ready, ledger.position) == (True, 0)


async def test_a_run_nobody_waits_for_that_has_run_moves_its_session(stream: Stream) -> None:
    ledger = stream.session(1)
    run = stream.run(ledger)
    run.answer.cancel()
    stream.conversation.give_up(run)
    stream.answers({run.request: 1}, [5])
    assert (ledger.ready, ledger.position) == (True, 1)
    stream.conversation.give_up(run)  # too late: nothing more is sent
    assert [command.WhichOneof("command") for command in stream.sent()] == ["run", "cancel"]


async def test_what_waits_too_long_times_out_and_is_withdrawn(stream: Stream) -> None:
    late, patient = (
        stream.run(stream.session(1), deadline=10.0),
        stream.run(stream.session(2), deadline=20.0),
    )
    assert stream.deadlines == [10.0]
    stream.conversation.expire(10.0)
    assert isinstance(late.answer.exception(), TimedOut)
    assert not patient.answer.done()
    assert stream.conversation.next_deadline == 20.0
    assert [list(command.cancel.runs) for command in stream.sent()[1:]] == [[late.request]]
    assert not late.ledger.ready
    stream.refuses(late.request, ErrorReason.ERROR_REASON_RUN_TIMED_OUT, 4)
    assert late.ledger.ready
    stream.answers({patient.request: 1}, [5])
    stream.conversation.expire(30.0)
    assert stream.conversation.next_deadline == math.inf


OPEN_KEY = OpenKey(
    model="m",
    mode=OpenMode.OPEN_MODE_ATTACH_OR_CREATE,
    durability=Durability.DURABILITY_UNSPECIFIED,
    has_states=False,
)


def opened(request: int, session_id: str = "a", handle: int = 77, *, created: bool = True) -> Event:
    return Event(
        opened=OpenedEvent(
            requests=[request],
            session_ids=[session_id],
            handles=[handle],
            positions=[12],
            epochs=[3],
            created=[created],
        )
    )


async def test_opening_tells_everything_about_the_session(stream: Stream) -> None:
    answer = stream.conversation.send_open(OPEN_KEY, "a", HOLDER, None, math.inf)
    (command,) = stream.sent()
    assert list(command.open.holders) == [HOLDER]
    stream.says(opened(command.open.requests[0], created=False))
    session = answer.result()
    assert (session.session_id, session.handle, session.position, session.epoch) == ("a", 77, 12, 3)
    assert not session.created
    assert (session.durability, session.durable_position) == ("none", None)


async def test_an_open_that_is_refused_fails_alone(stream: Stream) -> None:
    answers = [stream.conversation.send_open(OPEN_KEY, name, HOLDER, None, math.inf) for name in "ab"]
    (command,) = stream.sent()
    stream.refuses(command.open.requests[1], ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, 5)
    error = answers[1].exception()
    assert isinstance(error, SessionNotFound)
    assert error.session_id == "b"
    assert not answers[0].done()


async def test_a_session_created_when_nobody_waits_any_more_is_closed_again(stream: Stream) -> None:
    answer = stream.conversation.send_open(OPEN_KEY, "made-for-this-open", HOLDER, None, math.inf, is_new=True)
    (command,) = stream.sent()
    answer.cancel()
    stream.says(opened(command.open.requests[0], "made-for-this-open", 91))
    (command,) = stream.sent()
    assert list(command.close.handles) == [91]


async def test_a_session_with_a_name_stays_open_when_nobody_waits_any_more(stream: Stream) -> None:
    answer = stream.conversation.send_open(OPEN_KEY, "a", HOLDER, None, math.inf)
    (command,) = stream.sent()
    answer.cancel()
    stream.says(opened(command.open.requests[0]))
    assert stream.sent() == []


async def test_a_session_is_closed_or_detached_when_that_is_done(stream: Stream) -> None:
    one, two = stream.session(1, position=5), stream.session(2)
    for ledger, handle in ((one, 1), (two, 2)):
        assert stream.conversation.release(ledger) == handle
    detach = stream.conversation.send_detach(one, 1, math.inf)
    close = stream.conversation.send_close(two, 2, math.inf)
    commands = stream.sent()
    assert [command.WhichOneof("command") for command in commands] == ["acknowledge", "detach", "close"]
    assert list(commands[0].acknowledge.positions) == [5]  # so that the server need not keep its answers
    stream.says(Event(done=DoneEvent(requests=commands[1].detach.requests, handles=[0], epochs=[5])))
    assert detach.done()
    assert not close.done()
    stream.says(Event(done=DoneEvent(requests=commands[2].close.requests, handles=[0], epochs=[5])))
    assert close.done()


async def test_an_ended_session_is_lost_and_only_that_one(stream: Stream) -> None:
    one, two = stream.session(1), stream.session(2)
    reasons = [ErrorReason.ERROR_REASON_SESSION_EXPIRED, ErrorReason.ERROR_REASON_SESSION_MOVED]
    stream.says(Event(ended=EndedEvent(handles=[1, 999], reasons=reasons)))
    assert (one.lost_reason, one.ready) == ("SESSION_EXPIRED", False)
    assert (two.lost_reason, two.ready) == (None, True)


async def test_a_stale_handle_is_explained_by_the_notice_before_it(stream: Stream) -> None:
    told, untold = stream.run(stream.session(1)), stream.run(stream.session(2))
    stream.says(Event(ended=EndedEvent(handles=[1], reasons=[ErrorReason.ERROR_REASON_SESSION_CLOSED])))
    for run in (told, untold):
        stream.refuses(run.request, ErrorReason.ERROR_REASON_STALE_HANDLE, 5)
    assert isinstance(told.answer.exception(), SessionClosed)
    assert isinstance(untold.answer.exception(), StaleHandle)
    assert (told.ledger.lost_reason, untold.ledger.lost_reason) == ("SESSION_CLOSED", "STALE_HANDLE")


async def test_durable_positions_and_draining_are_noted(stream: Stream) -> None:
    ledger = stream.session(1)
    stream.says(
        Event(durable=DurableEvent(handles=[1, 999], positions=[8, 9])),
        Event(draining=DrainingEvent(timeout_milliseconds=1500)),
    )
    assert ledger.durable_position == 8
    assert stream.conversation.is_draining


async def test_the_end_of_the_stream_fails_what_nobody_resumes_and_says_what_is_in_doubt(stream: Stream) -> None:
    ledger, other = stream.session(1), stream.session(2)
    sent = stream.run(ledger)
    block = stream.block([other], [1], stream.every)
    open_answer = stream.conversation.send_open(OPEN_KEY, "a", HOLDER, None, math.inf)
    stream.sent()
    unsent = stream.run(ledger)
    stream.conversation.end("UNAVAILABLE", "Socket closed")
    in_doubt = []
    for answer in (sent.answer, open_answer, unsent.answer):
        error = answer.exception()
        assert isinstance(error, ConnectionLost)
        in_doubt.append(error.in_doubt)
    assert in_doubt == [True, True, False]
    await block.answer
    assert isinstance(block.failures[0], ConnectionLost)
    for session in (ledger, other):
        assert (session.handle, session.ready, session.position, session.next_position) == (None, False, 0, 0)


class Owner:
    """Whoever attaches a session again, who only notes what he is told."""

    def __init__(self) -> None:
        self.troubles: list[CellserveError] = []
        self.given_up: list[Run] = []

    def stream_lost(self, trouble: CellserveError) -> None:
        self.troubles.append(trouble)

    def give_up(self, run: Run) -> None:
        self.given_up.append(run)


async def test_the_end_of_the_stream_strands_the_runs_of_sessions_that_are_resumed(stream: Stream) -> None:
    ledger = stream.session(1, position=4)
    ledger.owner = owner = Owner()
    first = stream.run(ledger, 7, deadline=LATER)
    block = stream.block([ledger], [2], stream.every, deadline=LATER)
    stream.sent()
    unsent = stream.run(ledger, 9, deadline=LATER)
    stream.conversation.end("INTERNAL", "RST_STREAM")
    assert [(run.position, run.count, run.was_sent) for run in ledger.stranded] == [
        (4, 1, True),
        (5, 2, True),
        (7, 1, False),
    ]
    assert [run.column for run in ledger.stranded] == [7, array("I", [0, 1]), 9]
    assert not any(answer.done() for answer in (first.answer, block.answer, unsent.answer))
    assert [type(trouble) for trouble in owner.troubles] == [ConnectionLost]
    assert (ledger.ready, ledger.num_unanswered, ledger.next_position) == (False, 3, 8)

    again = Stream()
    again.conversation.hold(ledger, 5, 2, 4)
    runs, forgotten = ledger.take_stranded(3)
    assert forgotten == []
    for run in runs:
        again.conversation.send_again(run, 5)
    (command,) = again.sent()
    assert list(command.run.positions) == [4, 5, 7]
    assert list(command.run.tokens) == [7, 0, 1, 9]
    one, two, three = command.run.requests
    again.answers({one: 5, two: 7, three: 8}, [1, 2, 3, 4], counts=[1, 2, 1])
    await block.answer
    assert (next_tokens(first), next_tokens(unsent)) == ([1], [4])
    assert block.buffer.finish([]).next_token.tolist() == [2, 3]  # type: ignore[union-attr]
    assert (ledger.ready, ledger.position) == (True, 8)


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNIMPLEMENTED"])
async def test_a_refusal_of_the_whole_stream_is_final(stream: Stream, code: str) -> None:
    ledger = stream.session(1)
    ledger.owner = Owner()
    run = stream.run(ledger)
    stream.conversation.end(code, None)
    assert isinstance(run.answer.exception(), CellserveError)
    assert ledger.stranded == []


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (ErrorReason.ERROR_REASON_DRAINING, 14),
        (ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, 14),
        (ErrorReason.ERROR_REASON_STALE_HANDLE, 5),
    ],
)
async def test_what_a_server_cannot_do_now_waits_for_the_next_attach_with_all_behind_it(
    stream: Stream, reason: ErrorReason.ValueType, code: int
) -> None:
    ledger = stream.session(1)
    ledger.owner = owner = Owner()
    runs = [stream.run(ledger) for _ in range(3)]
    stream.answers({runs[0].request: 1}, [5])
    stream.refuses(runs[1].request, reason, code)
    stream.refuses(runs[2].request, ErrorReason.ERROR_REASON_POSITION_GAP, 9, position=1)
    assert ledger.stranded == runs[1:]
    assert (len(owner.troubles), ledger.handle, ledger.position) == (1, None, 1)


async def test_a_repeat_whose_answer_is_gone_has_run_all_the_same(stream: Stream) -> None:
    ledger = stream.session(1, position=3)
    run = stream.run(ledger)
    run.was_sent = True
    stream.refuses(run.request, ErrorReason.ERROR_REASON_ANSWER_NOT_HELD, 10, position=6)
    assert isinstance(run.answer.exception(), AnswerNotHeld)
    assert (ledger.position, ledger.ready) == (4, True)


async def test_a_session_is_not_held_by_a_stream_that_has_ended(stream: Stream) -> None:
    stream.conversation.end("UNAVAILABLE", None)
    assert stream.session(5).handle is None


async def test_an_answer_that_nobody_asked_for_is_a_protocol_error(stream: Stream) -> None:
    with pytest.raises(ProtocolError, match="12345"):
        stream.answers({12345: 1}, [5])


async def test_a_frame_that_the_server_cannot_read_is_a_protocol_error(stream: Stream) -> None:
    with pytest.raises(ProtocolError, match="could not read"):
        stream.refuses(0, ErrorReason.ERROR_REASON_INVALID_INPUT, 3)


async def test_a_block_collects_its_answers_in_the_order_of_its_sessions(stream: Stream) -> None:
    ledgers = [stream.session(handle, position=handle) for handle in (1, 2, 3)]
    block = stream.block(ledgers, [1, 1, 1], stream.every)
    (command,) = stream.sent()
    first, second, third = command.run.requests
    assert list(command.run.positions) == [1, 2, 3]
    assert list(command.run.counts) == []
    stream.answers({third: 4, first: 2}, [30, 10])
    assert not block.answer.done()
    stream.answers({second: 3}, [20])
    assert block.answer.done()
    result = block.buffer.finish([])
    assert result.positions.tolist() == [2, 3, 4]
    assert result.next_token is not None
    assert result.next_token.tolist() == [10, 20, 30]
    assert [ledger.position for ledger in ledgers] == [2, 3, 4]
    assert all(ledger.ready for ledger in ledgers)


async def test_answers_of_blocks_and_of_single_runs_share_events(stream: Stream) -> None:
    single = stream.run(stream.session(9))
    one = stream.block([stream.session(1), stream.session(2)], [2, 3], stream.every)
    two = stream.block([stream.session(3)], [1], stream.every)
    requests = [request for command in stream.sent() for request in command.run.requests]
    alone, first, second, third = requests
    stream.answers(
        {second: 2, alone: 1, third: 1, first: 2},
        [20, 21, 90, 30, 10, 11],
        counts=[2, 1, 1, 2],
        remaining=[1, 0, 0, 0],
    )
    assert next_tokens(single) == [90]
    assert two.answer.done()
    assert not one.answer.done()
    stream.answers({second: 3}, [22])
    result = one.buffer.finish([])
    assert result.next_token is not None
    assert result.next_token.tolist() == [10, 11, 20, 21, 22]
    assert result.row_starts.tolist() == [0, 2, 5]


async def test_two_slices_of_one_run_may_stand_in_one_event(stream: Stream) -> None:
    block = stream.block([stream.session(1), stream.session(2)], [4, 1], stream.every)
    (command,) = stream.sent()
    first, second = command.run.requests
    event = AnswerEvent(
        requests=[first, second, first],
        positions=[2, 1, 4],
        counts=[2, 1, 2],
        remaining=[2, 0, 0],
        outputs=OutputColumns(next_tokens=[1, 2, 9, 3, 4]),
    )
    stream.says(Event(answers=event))
    result = block.buffer.finish([])
    assert result.next_token is not None
    assert result.next_token.tolist() == [1, 2, 3, 4, 9]
    assert result.positions.tolist() == [4, 1]


async def test_rows_of_a_block_that_failed_are_left_out_of_its_result(stream: Stream) -> None:
    ledgers = [stream.session(1), stream.session(2), stream.session(3)]
    block = stream.block(ledgers, [2, 2, 1], stream.last)
    (command,) = stream.sent()
    first, second, third = command.run.requests
    stream.refuses(second, ErrorReason.ERROR_REASON_POSITION_GAP, 9, position=0)
    stream.answers({first: 2, third: 1}, [10, 30], counts=[2, 1])
    await block.answer
    assert list(block.failures) == [1]
    assert isinstance(block.failures[1], PositionGap)
    result = block.buffer.finish([1])
    assert result.next_token is not None
    assert result.next_token.tolist() == [10, 30]
    assert result.row_starts.tolist() == [0, 1, 1, 2]
    assert result.counts.tolist() == [2, 0, 1]


async def test_a_block_given_up_withdraws_what_has_no_answer(stream: Stream) -> None:
    ledgers = [stream.session(1), stream.session(2)]
    block = stream.block(ledgers, [1, 1], stream.every)
    (command,) = stream.sent()
    first, second = command.run.requests
    stream.answers({first: 1}, [5])
    block.answer.cancel()
    stream.conversation.give_up_block(block)
    (command,) = stream.sent()
    assert list(command.cancel.runs) == [second]
    assert [ledger.ready for ledger in ledgers] == [True, False]
    stream.refuses(second, ErrorReason.ERROR_REASON_RUN_CANCELLED, 1)
    assert ledgers[1].ready
    assert block.failures == {}


async def test_a_block_that_waits_too_long_keeps_the_answers_that_came_and_no_later_ones(stream: Stream) -> None:
    ledgers = [stream.session(1), stream.session(2)]
    block = stream.block(ledgers, [1, 1], stream.every, deadline=10.0)
    (command,) = stream.sent()
    first, second = command.run.requests
    stream.answers({first: 1}, [5])
    stream.conversation.expire(10.0)
    assert block.answer.done()
    assert list(block.failures) == [1]
    assert isinstance(block.failures[1], TimedOut)
    assert [list(command.cancel.runs) for command in stream.sent()] == [[second]]
    result = block.buffer.finish([1])
    stream.answers({second: 1}, [6])
    assert result.positions.tolist() == [1, 0]
    assert list(block.failures) == [1]
    assert (ledgers[1].position, ledgers[1].ready) == (1, True)


async def test_a_cancelled_waiter_does_not_disturb_the_others(stream: Stream) -> None:
    ledger = stream.session(1)
    runs = [stream.run(ledger) for _ in range(3)]
    runs[1].answer.cancel()
    stream.conversation.give_up(runs[1])
    stream.answers({runs[0].request: 1}, [5])
    stream.refuses(runs[1].request, ErrorReason.ERROR_REASON_RUN_CANCELLED, 1)
    stream.refuses(runs[2].request, ErrorReason.ERROR_REASON_POSITION_GAP, 9, position=1)
    assert next_tokens(runs[0]) == [5]
    assert isinstance(runs[2].answer.exception(), PositionGap)
    assert (ledger.ready, ledger.next_position) == (True, 1)
    await asyncio.sleep(0)
