"""Frames that are read together mean what each means alone, and stay in their stream's order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.v1.stream_pb2 import AcknowledgeCommand, Command, ResetCommand, RunCommand, StreamRequest
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputRequest
from cellserve_service import messages
from cellserve_service.decoding import decode_frame
from cellserve_service.frames import Frame, FrameReader
from cellserve_service.messages import Failures, SubmitRuns

OUTPUTS = [
    None,
    OutputRequest(at=OutputAt.OUTPUT_AT_LAST, next_token=True),
    OutputRequest(at=OutputAt.OUTPUT_AT_EVERY, top_k=5, states=True),
]
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@st.composite
def run_frames(draw: st.DrawFn) -> bytes:
    """A run command with few kinds of columns and any numbers in them, sound or not."""
    num_runs, count = draw(st.sampled_from([1, 1, 1, 3])), draw(st.sampled_from([1, 1, 2]))

    def column(numbers: st.SearchStrategy[int], number: int = num_runs) -> list[int]:
        return draw(st.lists(numbers, min_size=number, max_size=number))

    run = RunCommand(
        requests=column(st.one_of(st.integers(1, 9), U64)),
        handles=column(U64),
        counts=[count] * num_runs if count > 1 or draw(st.booleans()) else [],
        outputs=draw(st.sampled_from(OUTPUTS)),
    )
    if draw(st.integers(0, 3)):
        run.tokens.extend(column(U32, num_runs * count))
    else:
        values = np.array(column(U32, 2 * num_runs * count), "<u4").tobytes()
        run.vectors.CopyFrom(FloatBlock(shape=[num_runs * count, 2], values=values))
    if draw(st.booleans()):
        run.positions.extend(column(st.one_of(st.integers(0, 2**62), U64)))
    if draw(st.booleans()):
        run.acknowledged_positions.extend(column(st.integers(0, 2**62)))
    if draw(st.booleans()):
        run.timeouts_milliseconds.extend(column(U32))
    return StreamRequest(commands=[Command(run=run)]).SerializeToString()


OTHER_COMMANDS = [
    Command(reset=ResetCommand(requests=[1], handles=[5])),
    Command(acknowledge=AcknowledgeCommand(handles=[5], positions=[6])),
    Command(run=RunCommand(requests=[1, 2], handles=[1], tokens=[3])),
    Command(),
]


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Mostly runs; some with a byte changed, some with more commands, some that are none."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return StreamRequest(commands=draw(st.lists(st.sampled_from(OTHER_COMMANDS), max_size=2))).SerializeToString()
    frame = draw(run_frames())
    if kind == 1:
        return frame + draw(run_frames())
    if kind == 2:
        changed = bytearray(frame)
        changed[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    return frame


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 6), frames()), max_size=4), min_size=1, max_size=4),
    st.integers(2, 8),
    st.randoms(use_true_random=False),
)
def test_frames_read_together_mean_what_each_means_alone(
    batches: list[list[tuple[int, bytes]]], num_more: int, random: Any
) -> None:
    reader = FrameReader(max_open_sessions=10)
    for batch in batches:
        # The same frames of more streams, so that there is something to be read together.
        read = [Frame(stream + 100 * more, data) for stream, data in batch for more in range(num_more)]
        random.shuffle(read)
        expected = [command for frame in read for command in decode_frame(frame.stream, frame.data, 10)]
        found = [command for part in reader.read(read) for command in _commands(part)]
        assert _by_stream(found) == _by_stream(expected)


def _commands(part: SubmitRuns | Frame) -> Iterable[object]:
    return [part] if isinstance(part, SubmitRuns) else decode_frame(part.stream, part.data, 10)


def _by_stream(commands: Iterable[object]) -> dict[int, list[object]]:
    """What each stream asks for, run by run, in order."""
    said: dict[int, list[object]] = defaultdict(list)
    for command in commands:
        match command:
            case SubmitRuns():
                for place, stream in enumerate(command.streams.tolist()):
                    said[stream].append(_run(command, place))
            case Failures():
                said[command.stream].append((command.requests.tolist(), command.refusals))
            case messages.ResetSessions():
                target = command.target
                assert target.handles is not None
                said[target.stream].append(("reset", target.requests.tolist(), target.handles.tolist()))
            case messages.Acknowledge():
                said[command.stream].append(("known", command.handles.tolist(), command.positions.tolist()))
            case messages.CancelRuns():
                said[command.stream].append(("cancel", command.runs.tolist()))
            case messages.CloseSessions() | messages.DetachSessions():
                said[command.target.stream].append((type(command), command.target.requests.tolist()))
            case messages.OpenSessions():
                said[command.stream].append(("open", command.requests.tolist()))
            case _:
                raise AssertionError(command)
    return said


def _run(command: SubmitRuns, place: int) -> tuple[object, ...]:
    first, count = int(command.counts[:place].sum()), int(command.counts[place])
    given = [command.tokens, command.vectors]
    assert command.handles is not None
    assert command.counts.dtype == np.int64
    return (
        int(command.requests[place]),
        int(command.handles[place]),
        count,
        *[None if values is None else (values.dtype, values[first : first + count].tobytes()) for values in given],
        *[
            None if column is None else (column.dtype, column[place].item())
            for column in (command.positions, command.timeouts_seconds, command.acknowledged)
        ],
        command.outputs,
    )


def _step(stream: int, token: int, outputs: OutputRequest | None) -> Frame:
    run = RunCommand(requests=[token + 1], handles=[stream], tokens=[token], positions=[token], outputs=outputs)
    return Frame(stream, StreamRequest(commands=[Command(run=run)]).SerializeToString())


@pytest.mark.parametrize("turn", range(3))
def test_alike_frames_of_many_streams_become_one_command_each_time(turn: int) -> None:
    reader = FrameReader(max_open_sessions=10)
    for _ in range(turn + 1):
        steps = [_step(stream, stream % 7, OUTPUTS[1 + stream % 2]) for stream in range(1, 101)]
        assert len({len(frame.data) for frame in steps}) == 2  # two lengths, so two layouts
        read = list(reader.read(steps))
        assert all(isinstance(part, SubmitRuns) for part in read)
        assert sorted(len(part.requests) for part in read if isinstance(part, SubmitRuns)) == [50, 50]


def test_frames_that_one_stream_has_sent_ahead_stay_in_their_order() -> None:
    reader = FrameReader(max_open_sessions=10)
    steps = [_step(stream, token, OUTPUTS[1]) for stream in (1, 2, 3) for token in range(5)]
    read = list(reader.read(steps))
    assert [part.requests.tolist() for part in read if isinstance(part, SubmitRuns)] == [[n] * 3 for n in range(1, 6)]


def test_large_frames_are_read_one_by_one() -> None:
    reader = FrameReader(max_open_sessions=10)
    for num_tokens, is_large in ((1_000, False), (10_000, True)):
        run = RunCommand(requests=[1], handles=[1], counts=[num_tokens], tokens=[5] * num_tokens)
        data = StreamRequest(commands=[Command(run=run)]).SerializeToString()
        parts = list(reader.read([Frame(stream, data) for stream in range(1, 6)]))
        assert [isinstance(part, Frame) for part in parts] == ([True] * 5 if is_large else [False])


def test_layouts_are_learned_anew_when_clients_ask_for_something_else() -> None:
    reader = FrameReader(max_open_sessions=10)
    for top_k in range(1, 40):
        outputs = OutputRequest(at=OutputAt.OUTPUT_AT_LAST, top_k=top_k)
        [part] = reader.read([_step(stream, 0, outputs) for stream in range(1, 10)])
        assert isinstance(part, SubmitRuns)
        assert part.outputs.top_k == top_k
