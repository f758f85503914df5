"""Writes the columns of runs as protobuf without a Python object per number.

The generated classes take a column number by number, which for thousands of sessions costs more than everything else
in a frame.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from cellserve.columns import write_field
from cellserve.v1.stream_pb2 import Command, RunCommand, StreamRequest
from cellserve.v1.values_pb2 import FloatBlock

__all__ = ["Column", "RunColumns", "frame_bytes", "split_rows"]

# 64-bit columns for numbers of requests, handles and positions; 32-bit columns for the others.
Column: TypeAlias = "array[int] | npt.NDArray[np.uint64] | npt.NDArray[np.uint32]"

# Columns of a run beside its tokens: four of 64 bits, two of 32.
_ROW_BYTES: Final = 40


@dataclass(frozen=True, slots=True)
class RunColumns:
    """The columns of a RunCommand. n is the sum of counts, I the model's input size.

    counts: for every row, also where all are one and the column is not sent. tokens: n ids, or vectors: (n,
    I). outputs: a serialized OutputRequest, or empty.
    """

    requests: Column
    handles: Column
    counts: Column
    has_long_runs: bool
    tokens: Column | None
    vectors: npt.NDArray[np.float32] | None
    positions: Column
    timeouts_milliseconds: Column
    acknowledged_positions: Column
    outputs: bytes

    def encode(self, max_bytes: int) -> list[bytes]:
        """Serialized Commands of at most max_bytes each, as long as one row alone fits."""
        if self.vectors is None:
            token_bytes, num_input_bytes = 4, 0 if self.tokens is None else 4 * len(self.tokens)
        else:
            token_bytes, num_input_bytes = 4 * self.vectors.shape[1], self.vectors.nbytes
        if len(self.requests) * _ROW_BYTES + num_input_bytes <= max_bytes:
            return [self._encode_rows(slice(None), slice(None))]
        counts = np.asarray(self.counts, dtype=np.int64)
        token_starts = np.concatenate([[0], np.cumsum(counts)])
        return [
            self._encode_rows(slice(begin, end), slice(token_starts[begin], token_starts[end]))
            for begin, end in split_rows(_ROW_BYTES + counts * token_bytes, max_bytes)
        ]

    def _encode_rows(self, rows: slice, tokens: slice) -> bytes:
        parts = [
            _packed(RunCommand.REQUESTS_FIELD_NUMBER, self.requests[rows]),
            _packed(RunCommand.HANDLES_FIELD_NUMBER, self.handles[rows]),
            _packed(RunCommand.POSITIONS_FIELD_NUMBER, self.positions[rows]),
            _packed(RunCommand.TIMEOUTS_MILLISECONDS_FIELD_NUMBER, self.timeouts_milliseconds[rows]),
            _packed(RunCommand.ACKNOWLEDGED_POSITIONS_FIELD_NUMBER, self.acknowledged_positions[rows]),
        ]
        if self.has_long_runs:
            parts.append(_packed(RunCommand.COUNTS_FIELD_NUMBER, self.counts[rows]))
        if self.tokens is not None:
            parts.append(_packed(RunCommand.TOKENS_FIELD_NUMBER, self.tokens[tokens]))
        if self.vectors is not None:
            vectors = self.vectors[tokens]
            block = FloatBlock(shape=vectors.shape, values=vectors.astype("<f4", copy=False).tobytes())
            parts.append(write_field(RunCommand.VECTORS_FIELD_NUMBER, block.SerializeToString()))
        if self.outputs:
            parts.append(write_field(RunCommand.OUTPUTS_FIELD_NUMBER, self.outputs))
        return write_field(Command.RUN_FIELD_NUMBER, b"".join(parts))


def frame_bytes(commands: list[bytes]) -> bytes:
    """A serialized StreamRequest out of serialized Commands."""
    return b"".join([write_field(StreamRequest.COMMANDS_FIELD_NUMBER, command) for command in commands])


def split_rows(row_bytes: npt.NDArray[np.int64], max_bytes: int, max_rows: int | None = None) -> list[tuple[int, int]]:
    """Cuts rows of the given sizes into ranges (begin, end) of at most max_bytes and max_rows, one row at
    least each."""
    ends = np.cumsum(row_bytes)
    ranges = []
    begin = 0
    while begin < len(row_bytes):
        used = int(ends[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(ends, used + max_bytes, side="right")), begin + 1)
        if max_rows is not None:
            end = min(end, begin + max_rows)
        ranges.append((begin, end))
        begin = end
    return ranges


def _packed(field_number: int, column: Column) -> bytes:
    values = column if sys.byteorder == "little" else np.asarray(column).byteswap()
    return write_field(field_number, values.tobytes())
