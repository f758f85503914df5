"""The runs of one step_many as columns: sent, answered and collected without an object per session.

Symbols: m sessions, R output rows over all of them.
"""

from __future__ import annotations

import asyncio
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec
from cellserve._results import Columns, StepManyResult, StepResult
from cellserve._runs import Run
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve.columns import read_column
from cellserve.errors import CellserveError, TimedOut

__all__ = ["Answers", "Block", "ResultBuffer"]

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answers:
    """The rows of an answer event. The output rows of row i are row_starts[i] to row_starts[i + 1]."""

    requests: Index
    positions: Index
    remaining: Index
    row_starts: Index
    columns: Columns

    @classmethod
    def read(cls, event: Any, spec: OutputSpec) -> Answers:
        """event: a `columns.AnswerEvent`."""
        requests = read_column(event.requests, "<i8")
        counts = _read(event.counts) if event.counts else np.ones_like(requests)
        remaining = _read(event.remaining) if event.remaining else np.zeros_like(requests)
        num_rows = {"every": counts, "last": (remaining == 0).astype(np.int64), "none": np.zeros_like(counts)}
        return cls(
            requests=requests,
            positions=read_column(event.positions, "<i8"),
            remaining=remaining,
            row_starts=_starts(num_rows[spec.at]),
            columns=spec.read(event.outputs),
        )


class ResultBuffer:
    """Columns with room for the output rows of m sessions; finishes as a StepManyResult."""

    def __init__(self, counts: Index, spec: OutputSpec) -> None:
        self.counts = counts
        self.positions = np.zeros_like(counts)
        self.num_rows = {"every": counts, "last": np.ones_like(counts), "none": np.zeros_like(counts)}[spec.at]
        self.row_starts = _starts(self.num_rows)
        self._arrays: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]] = {}
        self._gates: dict[str, npt.NDArray[np.float32]] | None = None

    def put(self, target: Index, columns: Columns, source: Index | slice) -> None:
        """Copies the source rows of columns to the target rows."""
        for name, column in columns.arrays:
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._make_array(column)
            array[target] = column[source]
        if columns.gates is not None:
            if self._gates is None:
                self._gates = {name: self._make_array(gate) for name, gate in columns.gates.items()}
            for name, gate in columns.gates.items():
                self._gates[name][target] = gate[source]

    def put_result(self, index: int, result: StepResult) -> None:
        """Copies the whole result of session index."""
        self.positions[index] = result.position
        target = np.arange(self.row_starts[index], self.row_starts[index + 1])
        self.put(target, Columns.of(result), slice(None))

    def finish(self, failed: Sequence[int]) -> StepManyResult:
        """The result, without the rows of the sessions that failed."""
        counts, row_starts, arrays, gates = self.counts, self.row_starts, self._arrays, self._gates
        if failed:
            keeps = np.ones(len(counts), dtype=np.bool_)
            keeps[failed] = False
            keeps_row = np.repeat(keeps, self.num_rows)
            counts = np.where(keeps, counts, 0)
            row_starts = _starts(np.where(keeps, self.num_rows, 0))
            arrays = {name: array[keeps_row] for name, array in arrays.items()}
            if gates is not None:
                gates = {name: gate[keeps_row] for name, gate in gates.items()}
        return StepManyResult(self.positions, counts, row_starts, gates=gates, **arrays)  # type: ignore[arg-type]

    def _make_array(self, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.zeros((int(self.row_starts[-1]), *like.shape[1:]), dtype=like.dtype)


class Block:
    """Runs of many sessions under consecutive request numbers; row i is of the session with index members[i].

    tokens: those of all rows, ids or vectors, row after row. positions: where each run begins. A row that does not
    simply get its answer leaves the block: it goes on as a run of its own, whose answer comes back here.
    """

    def __init__(
        self,
        first_request: int,
        ledgers: Sequence[Ledger],
        members: Index,
        spec: OutputSpec,
        tokens: npt.NDArray[np.uint32] | VectorColumn,
        counts: Index,
        positions: Sequence[int],
        deadline: float,
        buffer: ResultBuffer,
    ) -> None:
        self.first_request = first_request
        self.ledgers = ledgers
        self.members = members
        self.spec = spec
        self.deadline = deadline
        self.buffer = buffer
        self.failures: dict[int, CellserveError] = {}  # by index of the session
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.runs: set[Run] = set()  # rows that have left
        self._tokens = tokens
        self._counts = counts
        self._token_starts = _starts(counts)
        self._positions = positions
        self._num_filled = np.zeros(len(ledgers), dtype=np.int64)  # output rows of each run that have come
        self._is_open = np.ones(len(ledgers), dtype=np.bool_)
        self._is_given_up = False  # answers still tell the sessions where they stand, but the result is out

    def __contains__(self, request: int) -> bool:
        return 0 <= request - self.first_request < len(self.ledgers)

    @property
    def num_answered(self) -> int:
        """Output rows and runs that have come, as a measure of progress."""
        return int(self._num_filled.sum()) + len(self.ledgers) - int(np.count_nonzero(self._is_open))

    @property
    def is_finished(self) -> bool:
        """Whether no row of it waits for an answer; some may go on as runs of their own."""
        return not self._is_open.any()

    def take(self, answers: Answers) -> npt.NDArray[np.bool_]:
        """Takes the answers that are for this block, and tells which of them are."""
        rows = answers.requests - self.first_request
        is_mine: npt.NDArray[np.bool_] = (rows >= 0) & (rows < len(self.ledgers))
        mine = np.flatnonzero(is_mine)
        if answers.remaining.any():
            for one in mine:  # slices of one run may stand in the same event
                self._take(answers, np.asarray([one]))
        elif len(mine):
            self._take(answers, mine)
        return is_mine

    def take_out(self, request: int) -> Run:
        """The row of this request, which goes on as a run of its own."""
        row = request - self.first_request
        self._is_open[row] = False
        begin, end = int(self._token_starts[row]), int(self._token_starts[row + 1])
        run = Run(
            request,
            self.ledgers[row],
            self.spec,
            self._column(begin, end),
            end - begin,
            self._positions[row],
            self.spec.answer_bytes(end - begin),
            self.deadline,
            asyncio.get_running_loop().create_future(),
        )
        if self._is_given_up:
            run.answer.cancel()
        else:
            self.runs.add(run)
            run.answer.add_done_callback(functools.partial(self._take_run, run, int(self.members[row])))
        return run

    def break_up(self) -> list[Run]:
        """Every row that has no answer yet, as a run of its own."""
        return [self.take_out(self.first_request + row) for row in np.flatnonzero(self._is_open).tolist()]

    def expire(self) -> list[tuple[Ledger, int]]:
        """Fails every run that has no answer yet, and gives it up."""
        for row in np.flatnonzero(self._is_open).tolist():
            error = TimedOut("the step was not answered within its timeout", session_id=self.ledgers[row].session_id)
            self.failures[int(self.members[row])] = error
        to_withdraw = self.give_up()
        self._finish_if_answered()
        return to_withdraw

    def give_up(self) -> list[tuple[Ledger, int]]:
        """Nobody waits any more for the rows of the block. Returns the runs to withdraw, with their sessions."""
        self._is_given_up = True
        unanswered = [(self.ledgers[row], self.first_request + row) for row in np.flatnonzero(self._is_open).tolist()]
        for ledger, _ in unanswered:
            ledger.give_up()
        return unanswered

    def _take(self, answers: Answers, mine: Index) -> None:
        rows = answers.requests[mine] - self.first_request
        is_last = answers.remaining[mine] == 0
        finished, positions = rows[is_last], answers.positions[mine][is_last]
        if not self._is_given_up:
            starts, num_rows = answers.row_starts[mine], answers.row_starts[mine + 1] - answers.row_starts[mine]
            target_starts = self.buffer.row_starts[self.members[rows]] + self._num_filled[rows]
            self.buffer.put(_ranges(target_starts, num_rows), answers.columns, _ranges(starts, num_rows))
            self.buffer.positions[self.members[finished]] = positions
            self._num_filled[rows] += num_rows
        self._is_open[finished] = False
        ledgers, row_bytes = self.ledgers, self.spec.row_bytes
        for row, position, count in zip(
            finished.tolist(), positions.tolist(), self._counts[finished].tolist(), strict=True
        ):
            ledger = ledgers[row]
            if count == 1 and ledger.kept is None and not ledger.is_watched:
                # Ledger.answered, without the call.
                ledger.position = position
                ledger.num_unanswered -= 1
                ledger.unanswered_bytes -= row_bytes
                continue
            begin = int(self._token_starts[row])
            column = 0 if ledger.kept is None else self._column(begin, begin + count)  # made only where it is kept
            ledger.answered(position, column, self.spec.answer_bytes(count))
        self._finish_if_answered()

    def _take_run(self, run: Run, index: int, answer: asyncio.Future[StepResult]) -> None:
        self.runs.discard(run)
        if not answer.cancelled():
            error = answer.exception()
            if self.answer.done():
                return  # the result is out
            if isinstance(error, CellserveError):
                self.failures[index] = error
            elif error is None:
                self.buffer.put_result(index, answer.result())
        self._finish_if_answered()

    def _column(self, begin: int, end: int) -> int | TokenColumn | VectorColumn:
        tokens = self._tokens[begin:end]
        if self.spec.takes_vectors:
            return tokens.astype(np.float32, copy=False)
        return int(tokens[0]) if end - begin == 1 else array("I", tokens.tobytes())

    def _finish_if_answered(self) -> None:
        if (self._is_given_up or self.is_finished) and not self.runs and not self.answer.done():
            self.answer.set_result(None)


def _read(column: bytes) -> Index:
    return read_column(column, "<u4").astype(np.int64)


def _starts(num_rows: Index) -> Index:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(num_rows)])


def _ranges(starts: Index, lengths: Index) -> Index:
    """The numbers of every range [start, start + length), range after range."""
    if np.count_nonzero(lengths == 1) == len(lengths):
        return starts
    offsets = np.arange(int(lengths.sum()), dtype=np.int64)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + offsets
