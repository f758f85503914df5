"""The stepper as those see it who drive it, whatever device its states are on.

Symbols: B rows of a tick, N tokens of a tick, I input size, L layers, Q stop tokens.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve_model.stepper import Ticket
from cellserve_model.ticks import GenerateResult, ModelInfo, StepResult

__all__ = ["Stepper"]

ResultT = TypeVar("ResultT", StepResult, GenerateResult)


class Stepper(Protocol):
    """A loaded model with the states of its sessions; all calls come from one thread.

    Slots 1 to num_slots hold states; slot 0 is scratch. max_batch: the most rows of a tick. efficient_batch: from so
    many rows on a tick takes twice as long with twice as many. `load_stepper` makes one from a model directory; what
    the arguments are is said at CpuStepper.
    """

    @property
    def info(self) -> ModelInfo: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def efficient_batch(self) -> int: ...

    def submit(
        self,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        wants: NDArray[np.uint8],
        top_k: int,
    ) -> Ticket[StepResult]: ...

    def submit_generate(
        self,
        slots: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        temperatures: NDArray[np.float32],
        top_ks: NDArray[np.int64],
        top_ps: NDArray[np.float32],
        stop_tokens: NDArray[np.int64],
    ) -> Ticket[GenerateResult]: ...

    def collect(self, ticket: Ticket[ResultT]) -> ResultT: ...
    def read_rows(self, slots: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def write_rows(self, slots: NDArray[np.int64], rows: NDArray[np.float32]) -> None: ...
    def zero_rows(self, slots: NDArray[np.int64]) -> None: ...
    def copy_rows(self, source_slots: NDArray[np.int64], target_slots: NDArray[np.int64]) -> None: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...
