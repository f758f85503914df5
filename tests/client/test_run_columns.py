"""Columns written by hand are what the generated classes read, and never larger than a message may be."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellserve._wire import RunColumns, frame_bytes, split_rows
from cellserve.v1.stream_pb2 import Command, RunCommand, StreamRequest
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputRequest

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
OUTPUTS = OutputRequest(at=OutputAt.OUTPUT_AT_EVERY, next_token=True, top_k=3)

rows = st.lists(st.tuples(U64, U64, U64, U32, U64, st.lists(U32, min_size=1, max_size=5)), min_size=1, max_size=40)


def columns(rows: list[tuple[int, int, int, int, int, list[int]]], *, numpy: bool) -> tuple[RunColumns, RunCommand]:
    """The same rows for the hand and for the generated class."""
    requests, handles, positions, timeouts, acknowledged, runs = map(list, zip(*rows, strict=True))
    tokens = [token for run in runs for token in run]
    counts = [len(run) for run in runs]
    has_long_runs = any(count != 1 for count in counts)

    def wide(values: list[int]) -> "array[int] | np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return np.array(values, dtype=np.uint64) if numpy else array("Q", values)

    def narrow(values: list[int]) -> "array[int] | np.ndarray[tuple[int], np.dtype[np.uint32]]":
        return np.array(values, dtype=np.uint32) if numpy else array("I", values)

    ours = RunColumns(
        requests=wide(requests),
        handles=wide(handles),
        counts=narrow(counts),
        has_long_runs=has_long_runs,
        tokens=narrow(tokens),
        vectors=None,
        positions=wide(positions),
        timeouts_milliseconds=narrow(timeouts),
        acknowledged_positions=wide(acknowledged),
        outputs=OUTPUTS.SerializeToString(),
    )
    generated = RunCommand(
        requests=requests,
        handles=handles,
        counts=counts if has_long_runs else [],
        tokens=tokens,
        positions=positions,
        timeouts_milliseconds=timeouts,
        outputs=OUTPUTS,
        acknowledged_positions=acknowledged,
    )
    return ours, generated


@given(rows=rows, numpy=st.booleans())
@settings(deadline=None)
def test_hand_written_columns_read_as_those_of_the_generated_class(
    rows: list[tuple[int, int, int, int, int, list[int]]], numpy: bool
) -> None:
    ours, generated = columns(rows, numpy=numpy)
    (command,) = ours.encode(10**6)
    assert StreamRequest.FromString(frame_bytes([command])) == StreamRequest(commands=[Command(run=generated)])


@given(rows=rows, numpy=st.booleans(), max_bytes=st.integers(120, 400))
@settings(deadline=None)
def test_rows_too_many_for_one_message_are_split_in_order_and_each_part_fits(
    rows: list[tuple[int, int, int, int, int, list[int]]], numpy: bool, max_bytes: int
) -> None:
    ours, generated = columns(rows, numpy=numpy)
    overhead = 64  # tags, lengths and the outputs, for which the outbox keeps room
    merged = RunCommand()
    for command in ours.encode(max_bytes):
        assert len(command) <= max_bytes + overhead
        part = Command.FromString(command).run
        assert sum(part.counts) == len(part.tokens) or not part.counts
        outputs = part.outputs
        assert outputs == OUTPUTS
        part.ClearField("outputs")
        merged.MergeFrom(part)
    generated.ClearField("outputs")
    assert merged == generated


def test_vectors_travel_as_a_block_of_their_shape_and_split_with_their_rows() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    ours = RunColumns(
        requests=array("Q", [1, 2]),
        handles=array("Q", [7, 8]),
        counts=array("I", [3, 1]),
        has_long_runs=True,
        tokens=None,
        vectors=vectors,
        positions=array("Q", [0, 5]),
        timeouts_milliseconds=array("I", [1, 1]),
        acknowledged_positions=array("Q", [0, 5]),
        outputs=b"",
    )
    whole = [Command.FromString(command).run for command in ours.encode(10**6)]
    assert whole[0].vectors == FloatBlock(shape=[4, 3], values=vectors.tobytes())
    assert not whole[0].HasField("outputs")
    first, second = (Command.FromString(command).run for command in ours.encode(80))
    assert first.vectors == FloatBlock(shape=[3, 3], values=vectors[:3].tobytes())
    assert second.vectors == FloatBlock(shape=[1, 3], values=vectors[3:].tobytes())


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "max_rows", "ranges"),
    [
        ([], 10, None, []),
        ([4, 4, 4], 8, None, [(0, 2), (2, 3)]),
        ([4, 4, 4], 12, None, [(0, 3)]),
        ([20, 4, 20], 10, None, [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 1, 1], 10, 3, [(0, 3), (3, 4)]),
    ],
)
def test_rows_are_cut_by_size_and_number_but_never_below_one(
    sizes: list[int], max_bytes: int, max_rows: int | None, ranges: list[tuple[int, int]]
) -> None:
    assert split_rows(np.array(sizes, dtype=np.int64), max_bytes, max_rows) == ranges
