"""Reads frames of many streams together: those that differ in their numbers alone become one command, by columns.

Clients that share nothing send a message a token, each with the same fields in the same order. So the frames of one
length are laid out as rows of bytes, and where all but the columns is as in a frame that was read before, the columns
are cut out of all rows at once. n frames of k rows, L bytes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.stream_pb2 import Command, RunCommand, StreamRequest
from cellserve.v1.values_pb2 import FloatBlock
from cellserve_service.decoding import decode_frame
from cellserve_service.messages import SubmitRuns
from cellserve_service.state_format import MAX_POSITION
from cellserve_service.stepping import IntArray

__all__ = ["Frame", "FrameReader"]

# Fewer frames are read quicker one by one.
_LEAST_ALIKE: Final = 3
# Larger ones, too: what is done once for each is little beside its columns, and a layout keeps a frame's columns.
_LARGEST_BYTES: Final = 16_384
# Layouts remembered, of one length, and lengths.
_MOST_LAYOUTS: Final = 4
_MOST_LENGTHS: Final = 64

_LENGTH_DELIMITED: Final = 2
_COLUMNS: Final = {
    RunCommand.REQUESTS_FIELD_NUMBER: "requests",
    RunCommand.HANDLES_FIELD_NUMBER: "handles",
    RunCommand.TOKENS_FIELD_NUMBER: "tokens",
    RunCommand.POSITIONS_FIELD_NUMBER: "positions",
    RunCommand.TIMEOUTS_MILLISECONDS_FIELD_NUMBER: "timeouts",
    RunCommand.ACKNOWLEDGED_POSITIONS_FIELD_NUMBER: "acknowledged",
}
# What is the same in all frames of a layout.
_CONSTANTS: Final = {RunCommand.COUNTS_FIELD_NUMBER, RunCommand.OUTPUTS_FIELD_NUMBER}


class Frame(NamedTuple):
    """A frame of a stream."""

    stream: int
    data: bytes


class FrameReader:
    """Sorts frames that can be read together from those that cannot."""

    def __init__(self, max_open_sessions: int) -> None:
        self._max_open_sessions = max_open_sessions
        self._layouts: dict[int, list[_Layout]] = {}  # by length, the newest last

    def read(self, frames: Sequence[Frame]) -> Iterator[SubmitRuns | Frame]:
        """Runs of the frames that are alike, and every other frame as it is; those of one stream in order."""
        if len(frames) < _LEAST_ALIKE:
            yield from frames
            return
        for turn in _turns(frames):
            by_length: dict[int, list[Frame]] = defaultdict(list)
            for frame in turn:
                by_length[len(frame.data)].append(frame)
            for length, alike in by_length.items():
                yield from self._read_alike(length, alike)

    def _read_alike(self, length: int, frames: list[Frame]) -> Iterator[SubmitRuns | Frame]:
        """Frames of different streams, all of one length."""
        left = np.arange(len(frames))  # places of those that are not read yet
        if len(frames) >= _LEAST_ALIKE and length <= _LARGEST_BYTES:
            rows = np.frombuffer(b"".join([frame.data for frame in frames]), np.uint8).reshape(len(frames), length)
            streams = np.array([frame.stream for frame in frames], np.int64)
            known = self._known(length)
            untried, num_learned = known.copy(), 0
            while len(left) >= _LEAST_ALIKE:
                if untried:
                    layout = untried.pop()
                else:
                    num_learned += 1
                    learned = _Layout.of(frames[int(left[0])].data, self._max_open_sessions)
                    if learned is None or num_learned > _MOST_LAYOUTS:
                        break
                    layout = learned
                    known.append(layout)
                    del known[:-_MOST_LAYOUTS]
                fits = layout.fits(rows[left])
                if np.count_nonzero(fits):
                    which = left[fits]
                    left = left[~fits]
                    yield layout.runs(streams[which], rows[which])
        yield from (frames[place] for place in left.tolist())

    def _known(self, length: int) -> list["_Layout"]:
        """Layouts of this length, the newest last."""
        if length not in self._layouts and len(self._layouts) >= _MOST_LENGTHS:
            self._layouts.clear()
        return self._layouts.setdefault(length, [])


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the columns lie in a frame of one run command."""

    columns: dict[str, slice]
    rest: IntArray  # places of all other bytes
    rest_bytes: NDArray[np.uint8]
    example: SubmitRuns

    @classmethod
    def of(cls, frame: bytes, max_open_sessions: int) -> Self | None:
        """The layout of a frame; None unless it is a good one of just one run command."""
        columns = _columns(frame)
        if columns is None:
            return None
        read = list(decode_frame(0, frame, max_open_sessions))
        if len(read) != 1 or not isinstance(read[0], SubmitRuns):
            return None
        is_rest = np.ones(len(frame), np.bool_)
        for column in columns.values():
            is_rest[column] = False
        rest = np.flatnonzero(is_rest)
        return cls(columns, rest, np.frombuffer(frame, np.uint8)[rest], read[0])

    def fits(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which frames are of this layout, and valid: (n,). rows: (n, L)."""
        fits: NDArray[np.bool_] = (rows[:, self.rest] == self.rest_bytes).all(axis=1)
        fits &= self._column(rows, "requests", "<u8").all(axis=1)
        for name in ("positions", "acknowledged"):
            if name in self.columns:
                fits &= (self._column(rows, name, "<u8") <= MAX_POSITION).all(axis=1)
        return fits

    def runs(self, streams: IntArray, rows: NDArray[np.uint8]) -> SubmitRuns:
        """The runs of frames that fit. streams: (n,); rows: (n, L)."""
        example, number = self.example, len(streams)
        num_runs = len(example.requests)
        timeouts = self._numbers(rows, "timeouts", "<u4")
        vectors = self._numbers(rows, "vectors", "<f4")
        assert example.vectors is None or vectors is not None
        return SubmitRuns(
            streams=streams if num_runs == 1 else streams.repeat(num_runs),
            requests=self._column(rows, "requests", "<u8").ravel(),
            handles=self._numbers(rows, "handles", "<u8"),
            session_ids=None,
            counts=np.tile(example.counts, number),
            tokens=None if example.tokens is None else self._numbers(rows, "tokens", "<u4"),
            vectors=None if example.vectors is None else vectors.reshape(-1, example.vectors.shape[1]),
            positions=self._numbers(rows, "positions", "<i8"),
            timeouts_seconds=None if timeouts is None else timeouts / 1000.0,
            acknowledged=self._numbers(rows, "acknowledged", "<i8"),
            outputs=example.outputs,
        )

    def _numbers(self, rows: NDArray[np.uint8], name: str, dtype: str) -> Any:
        return self._column(rows, name, dtype).ravel() if name in self.columns else None

    def _column(self, rows: NDArray[np.uint8], name: str, dtype: str) -> NDArray[Any]:
        """A column's numbers: (n, of each frame)."""
        return np.ascontiguousarray(rows[:, self.columns[name]]).view(dtype)


def _turns(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The first frame of each stream, then the second of each, and so on."""
    if len({frame.stream for frame in frames}) == len(frames):
        return [list(frames)]
    turns: list[list[Frame]] = []
    num_seen: dict[int, int] = defaultdict(int)
    for frame in frames:
        turn = num_seen[frame.stream]
        num_seen[frame.stream] += 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(frame)
    return turns


def _columns(frame: bytes) -> dict[str, slice] | None:
    """Where the columns of a frame lie that is one run command, every field of it once; None for another."""
    command = _only_field(frame, slice(0, len(frame)), StreamRequest.COMMANDS_FIELD_NUMBER)
    run = None if command is None else _only_field(frame, command, Command.RUN_FIELD_NUMBER)
    fields = None if run is None else _fields(frame, run)
    if fields is None or RunCommand.REQUESTS_FIELD_NUMBER not in fields:
        return None
    columns: dict[str, slice] = {}
    for number, content in fields.items():
        if number in _COLUMNS:
            columns[_COLUMNS[number]] = content
        elif number == RunCommand.VECTORS_FIELD_NUMBER:
            block = _fields(frame, content)
            if block is None or FloatBlock.VALUES_FIELD_NUMBER not in block:
                return None
            columns["vectors"] = block[FloatBlock.VALUES_FIELD_NUMBER]
        elif number not in _CONSTANTS:
            return None
    # An empty column is as good as none.
    return {name: column for name, column in columns.items() if column.stop > column.start}


def _only_field(frame: bytes, within: slice, number: int) -> slice | None:
    fields = _fields(frame, within)
    return None if fields is None or fields.keys() != {number} else fields[number]


def _fields(frame: bytes, within: slice) -> dict[int, slice] | None:
    """Content of the fields in a part of a frame, by number; None unless each stands once and carries its length."""
    fields: dict[int, slice] = {}
    place, end = within.start, within.stop
    while place < end:
        tag = frame[place]
        length, place = _varint(frame, place + 1, end)
        number = tag >> 3
        if tag & 7 != _LENGTH_DELIMITED or tag > 0x7F or number in fields or length < 0 or place + length > end:
            return None
        fields[number] = slice(place, place + length)
        place += length
    return fields


def _varint(frame: bytes, place: int, end: int) -> tuple[int, int]:
    """A number and the place behind it; -1 if it is cut off."""
    value = shift = 0
    while place < end and shift < 35:
        byte = frame[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    return -1, place
