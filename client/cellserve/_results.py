"""What steps give back: dataclasses over the columns of an answer.

Shapes: n tokens of one step (1 where only the last was asked for), k likeliest tokens, O head outputs, L
layers, H hidden size, S numbers of state per layer, m sessions of one step_many, R output rows over all of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Columns", "StepManyResult", "StepResult", "join_results"]

# Above this many bytes a result copies its rows, so that keeping one result does not keep a whole frame's.
_MAX_SHARED_BYTES: Final = 65536


@dataclass(frozen=True, eq=False)
class StepResult:
    """The answer to one step. An array that was not asked for is None.

    position: the session's position after the step, in tokens.
    next_token: (n,) int64, the likeliest next token after each.
    top_tokens, top_logprobs: (n, k) int64 and float32, the likeliest next tokens after each, likeliest first.
    logprobs: (n,) float32, log p(observed token | what came before), natural; its negative is the surprisal.
    outputs: (n, O) float32, the head output after each token (for a token model: the logits).
    states: (n, L, S) float32, the whole state after each token; `lstm` holds h, then c.
    gates: name to (n, L, H) float32, the activations of the gates at each token.
    """

    position: int
    next_token: npt.NDArray[np.int64] | None = None
    top_tokens: npt.NDArray[np.int64] | None = None
    top_logprobs: npt.NDArray[np.float32] | None = None
    logprobs: npt.NDArray[np.float32] | None = None
    outputs: npt.NDArray[np.float32] | None = None
    states: npt.NDArray[np.float32] | None = None
    gates: Mapping[str, npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True, eq=False)
class StepManyResult:
    """The answers to one step of many sessions: columns, session after session in the order passed in.

    positions: (m,) int64, each session's position after the step. counts: (m,) int64, tokens each has
    consumed. row_starts: (m + 1,) int64: the rows of session i in the columns below are row_starts[i] to
    row_starts[i + 1]. The columns are those of StepResult with R rows in place of n. `result[i]` is the
    StepResult of session i.
    """

    positions: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    row_starts: npt.NDArray[np.int64]
    next_token: npt.NDArray[np.int64] | None = None
    top_tokens: npt.NDArray[np.int64] | None = None
    top_logprobs: npt.NDArray[np.float32] | None = None
    logprobs: npt.NDArray[np.float32] | None = None
    outputs: npt.NDArray[np.float32] | None = None
    states: npt.NDArray[np.float32] | None = None
    gates: Mapping[str, npt.NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> StepResult:
        position = int(self.positions[index])  # IndexError ends an iteration over the result
        index %= len(self)
        begin, end = int(self.row_starts[index]), int(self.row_starts[index + 1])
        return Columns.of(self).result(position, begin, end)

    def __iter__(self) -> Iterator[StepResult]:
        columns = Columns.of(self)
        for index, position in enumerate(self.positions.tolist()):
            yield columns.result(position, int(self.row_starts[index]), int(self.row_starts[index + 1]))


_ARRAY_NAMES: Final = tuple(field.name for field in fields(StepResult) if field.name not in {"position", "gates"})


class Columns:
    """The output columns of one answer frame, or of one step_many; rows of them make results."""

    __slots__ = ("_is_large", "arrays", "gates")

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]],
        gates: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self.arrays = tuple(arrays.items())
        self.gates = gates
        num_bytes = sum(array.nbytes for _, array in self.arrays)
        if gates is not None:
            num_bytes += sum(gate.nbytes for gate in gates.values())
        self._is_large = num_bytes > _MAX_SHARED_BYTES

    @classmethod
    def of(cls, result: StepResult | StepManyResult) -> Columns:
        """The columns of a result."""
        arrays = {name: getattr(result, name) for name in _ARRAY_NAMES}
        return cls({name: array for name, array in arrays.items() if array is not None}, result.gates)

    def result(self, position: int, begin: int, end: int) -> StepResult:
        """The result that the rows from begin to end make."""
        # Not through __init__, whose setters for frozen fields cost a microsecond a step.
        result = _new(StepResult)
        values = result.__dict__
        values["position"] = position
        if self._is_large:
            for name, array in self.arrays:
                values[name] = array[begin:end].copy()
            if self.gates is not None:
                values["gates"] = {name: gate[begin:end].copy() for name, gate in self.gates.items()}
        else:
            for name, array in self.arrays:
                values[name] = array[begin:end]
            if self.gates is not None:
                values["gates"] = {name: gate[begin:end] for name, gate in self.gates.items()}
        return result


def join_results(results: Sequence[StepResult]) -> StepResult:
    """One result out of those of consecutive parts of a step, first part first."""
    if len(results) == 1:
        return results[0]
    last = results[-1]
    gates = None
    if last.gates is not None:
        parts = [result.gates for result in results if result.gates is not None]
        gates = {name: np.concatenate([part[name] for part in parts]) for name in last.gates}
    arrays = {name: _joined([getattr(result, name) for result in results]) for name in _ARRAY_NAMES}
    return StepResult(last.position, gates=gates, **arrays)


def _joined(parts: list[Any]) -> Any:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


_new = object.__new__
