"""Gathers the commands that are asked for at the same moment, and makes frames of them.

Runs that ask for the same outputs of the same model share one command. Commands are numbered as they are
begun, and a session remembers the number of the last one it has a row in: its next row goes into that one or
a later one, so that the rows of a session never overtake each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np

from cellserve._info import ServerLimits
from cellserve._outputs import OutputSpec
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve._wire import RunColumns, frame_bytes, split_rows
from cellserve.v1.stream_pb2 import (
    AcknowledgeCommand,
    CancelCommand,
    CloseCommand,
    Command,
    DetachCommand,
    Durability,
    OpenCommand,
    OpenMode,
)

__all__ = ["OpenKey", "Outbox"]

# Tags and lengths around the columns of a command, the outputs it asks for, and the frame around it.
_OVERHEAD_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class OpenKey:
    """What the rows of one OpenCommand have in common."""

    model: str
    mode: OpenMode.ValueType
    durability: Durability.ValueType
    has_states: bool


class Outbox:
    """The commands that wait to be sent. wake: called with the first of them.

    The methods that add a row of a session take the number of the command that has its last row, and return
    the number of the one that has it now.
    """

    def __init__(self, limits: ServerLimits, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._max_command_bytes = limits.max_message_bytes - _OVERHEAD_BYTES
        self._max_open_sessions = limits.max_open_sessions
        self._num_commands = 0
        self._commands: list[_Command] = []
        # The commands of each kind that still take rows.
        self._runs: dict[OutputSpec, _Runs] = {}
        self._opens: dict[OpenKey, _Opens] = {}
        self._pairs: dict[_MakePairs, _Pairs] = {}

    def add_run(
        self,
        after: int,
        spec: OutputSpec,
        request: int,
        handle: int,
        column: int | TokenColumn | VectorColumn,
        count: int,
        position: int,
        timeout_milliseconds: int,
        acknowledged_position: int,
    ) -> int:
        """One run: a token id, or a column of count tokens."""
        runs = self._runs.get(spec)
        if runs is None or runs.number < after:
            runs = self._runs[spec] = _Runs(self._next_number(), spec)
            self._begin(runs)
        if type(column) is int:
            runs.tokens.append(column)
        elif isinstance(column, array):
            runs.tokens.extend(column)
        elif isinstance(column, np.ndarray):
            runs.vectors.append(column)
        if count != 1:
            runs.has_long_runs = True
        runs.requests.append(request)
        runs.handles.append(handle)
        runs.counts.append(count)
        runs.positions.append(position)
        runs.timeouts_milliseconds.append(timeout_milliseconds)
        runs.acknowledged_positions.append(acknowledged_position)
        return runs.number

    def add_columns(self, columns: RunColumns) -> int:
        """A run command of its own."""
        command = _ReadyRuns(self._next_number(), columns)
        self._begin(command)
        return command.number

    def add_open(self, key: OpenKey, request: int, session_id: str, holder: int, state: bytes | None) -> None:
        """One session to open."""
        opens = self._opens.get(key)
        # The ids of one command are all different.
        if opens is None or session_id in opens.session_ids:
            opens = self._opens[key] = _Opens(self._next_number(), key, self._max_open_sessions)
            self._begin(opens)
        opens.requests.append(request)
        opens.session_ids[session_id] = None
        opens.holders.append(holder)
        if state is not None:
            opens.states.append(state)

    def add_close(self, after: int, request: int, handle: int) -> int:
        return self._add_pair(_make_close, after, request, handle)

    def add_detach(self, after: int, request: int, handle: int) -> int:
        return self._add_pair(_make_detach, after, request, handle)

    def add_acknowledge(self, after: int, handle: int, position: int) -> int:
        return self._add_pair(_make_acknowledge, after, handle, position)

    def add_cancel(self, after: int, request: int) -> int:
        return self._add_pair(_make_cancel, after, request, 0)

    def take(self) -> list[bytes]:
        """Everything that waits, as serialized StreamRequests in order, each within the server's message limit."""
        commands, self._commands = self._commands, []
        self._runs.clear()
        self._opens.clear()
        self._pairs.clear()
        frames: list[bytes] = []
        frame: list[bytes] = []
        num_bytes = 0
        for command in commands:
            for encoded in command.encode(self._max_command_bytes):
                if frame and num_bytes + len(encoded) > self._max_command_bytes:
                    frames.append(frame_bytes(frame))
                    frame, num_bytes = [], 0
                frame.append(encoded)
                num_bytes += len(encoded) + 8
        if frame:
            frames.append(frame_bytes(frame))
        return frames

    def _next_number(self) -> int:
        self._num_commands += 1
        return self._num_commands

    def _begin(self, command: _Command) -> None:
        if not self._commands:
            self._wake()
        self._commands.append(command)

    def _add_pair(self, make: _MakePairs, after: int, first: int, second: int) -> int:
        pairs = self._pairs.get(make)
        if pairs is None or pairs.number < after:
            pairs = self._pairs[make] = _Pairs(self._next_number(), make)
            self._begin(pairs)
        pairs.firsts.append(first)
        pairs.seconds.append(second)
        return pairs.number


class _Command(Protocol):
    def encode(self, max_bytes: int) -> list[bytes]: ...


class _Runs:
    """A run command that grows row by row."""

    __slots__ = (
        "acknowledged_positions",
        "counts",
        "handles",
        "has_long_runs",
        "number",
        "positions",
        "requests",
        "spec",
        "timeouts_milliseconds",
        "tokens",
        "vectors",
    )

    def __init__(self, number: int, spec: OutputSpec) -> None:
        self.number = number
        self.spec = spec
        self.requests = array("Q")
        self.handles = array("Q")
        self.counts = array("I")
        self.has_long_runs = False
        self.tokens = array("I")
        self.vectors: list[VectorColumn] = []
        self.positions = array("Q")
        self.timeouts_milliseconds = array("I")
        self.acknowledged_positions = array("Q")

    def encode(self, max_bytes: int) -> list[bytes]:
        takes_vectors = self.spec.takes_vectors
        columns = RunColumns(
            requests=self.requests,
            handles=self.handles,
            counts=self.counts,
            has_long_runs=self.has_long_runs,
            tokens=None if takes_vectors else self.tokens,
            vectors=np.concatenate(self.vectors) if takes_vectors else None,
            positions=self.positions,
            timeouts_milliseconds=self.timeouts_milliseconds,
            acknowledged_positions=self.acknowledged_positions,
            outputs=self.spec.encoded,
        )
        return columns.encode(max_bytes)


@dataclass(frozen=True, slots=True)
class _ReadyRuns:
    """A run command whose columns came as a whole."""

    number: int
    columns: RunColumns

    def encode(self, max_bytes: int) -> list[bytes]:
        return self.columns.encode(max_bytes)


class _Opens:
    """An open command that grows row by row."""

    def __init__(self, number: int, key: OpenKey, max_rows: int) -> None:
        self.number = number
        self.key = key
        self.max_rows = max_rows
        self.requests: list[int] = []
        self.session_ids: dict[str, None] = {}
        self.holders: list[int] = []
        self.states: list[bytes] = []

    def encode(self, max_bytes: int) -> list[bytes]:
        session_ids = list(self.session_ids)
        row_bytes = np.full(len(self.requests), 16, dtype=np.int64)
        row_bytes += [len(session_id.encode()) + 4 for session_id in session_ids]
        if self.states:
            row_bytes += [len(state) + 6 for state in self.states]
        commands = []
        for begin, end in split_rows(row_bytes, max_bytes - len(self.key.model.encode()), self.max_rows):
            command = OpenCommand(
                requests=self.requests[begin:end],
                model=self.key.model,
                session_ids=session_ids[begin:end],
                mode=self.key.mode,
                durability=self.key.durability,
                states=self.states[begin:end],
                holders=self.holders[begin:end],
            )
            commands.append(Command(open=command).SerializeToString())
        return commands


_MakePairs: TypeAlias = Callable[[list[int], list[int]], Command]


class _Pairs:
    """A command of two columns of numbers that grows row by row."""

    def __init__(self, number: int, make: _MakePairs) -> None:
        self.number = number
        self.make = make
        self.firsts: list[int] = []
        self.seconds: list[int] = []

    def encode(self, max_bytes: int) -> list[bytes]:
        return [
            self.make(self.firsts[begin:end], self.seconds[begin:end]).SerializeToString()
            for begin, end in split_rows(np.full(len(self.firsts), 16, dtype=np.int64), max_bytes)
        ]


def _make_close(requests: list[int], handles: list[int]) -> Command:
    return Command(close=CloseCommand(requests=requests, handles=handles))


def _make_detach(requests: list[int], handles: list[int]) -> Command:
    return Command(detach=DetachCommand(requests=requests, handles=handles))


def _make_acknowledge(handles: list[int], positions: list[int]) -> Command:
    return Command(acknowledge=AcknowledgeCommand(handles=handles, positions=positions))


def _make_cancel(runs: list[int], _: list[int]) -> Command:
    return Command(cancel=CancelCommand(runs=runs))
