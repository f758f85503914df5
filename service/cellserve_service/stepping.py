"""What the engine needs of a model: a stepper that advances rows of a slab, in numpy terms.

Shapes: B rows of a tick, N tokens of a tick, L layers, H hidden, O output size, I input size.
"""

from enum import IntFlag
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.uint32]


class Want(IntFlag):
    """Outputs that one token of a tick asks for: bits of the `wants` column."""

    NEXT_TOKEN = 1
    TOP_K = 2
    LOGPROB = 4
    HEAD_OUTPUT = 8
    STATE = 16
    GATES = 32


class ModelInfo(Protocol):
    """What is served: sizes, kind of input, identity."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def fingerprint(self) -> bytes: ...
    @property
    def cell(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def state_size(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def input_size(self) -> int | None: ...
    @property
    def output_size(self) -> int | None: ...
    @property
    def gate_names(self) -> tuple[str, ...]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def device(self) -> str: ...


class StepResult(Protocol):
    """Outputs of a tick; each array has one row for each token that asked, in token order."""

    @property
    def next_tokens(self) -> TokenArray: ...  # (n,)
    @property
    def top_tokens(self) -> TokenArray: ...  # (n, k)
    @property
    def top_logprobs(self) -> FloatArray: ...  # (n, k)
    @property
    def logprobs(self) -> FloatArray: ...  # (n,)
    @property
    def logits(self) -> FloatArray: ...  # (n, O)
    @property
    def states(self) -> FloatArray: ...  # (n, L, state_size)
    @property
    def gates(self) -> FloatArray: ...  # (n, number of gates, L, H)
    @property
    def num_padding_rows(self) -> int: ...
    @property
    def compute_seconds(self) -> float: ...


class GenerateResult(Protocol):
    """Tokens sampled in a tick: the first `counts[b]` of row b are real, and consumed. T: the most of a row."""

    @property
    def tokens(self) -> TokenArray: ...  # (B, T)
    @property
    def logprobs(self) -> FloatArray: ...  # (B, T)
    @property
    def counts(self) -> IntArray: ...  # (B,)
    @property
    def num_padding_rows(self) -> int: ...
    @property
    def compute_seconds(self) -> float: ...


class Stepper(Protocol):
    """One model with its slab. Slots 1 to `num_slots` hold states; all calls come from one thread."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def efficient_batch(self) -> int: ...  # a tick of fewer rows takes nearly as long as one of so many

    def submit(
        self,
        slots: IntArray,  # (B,) all different
        counts: IntArray,  # (B,) at least 1
        tokens: TokenArray | FloatArray,  # (N,) or (N, I), row after row
        wants: NDArray[np.uint8],  # (N,) bits of Want
        top_k: int,
    ) -> Any: ...

    def submit_generate(
        self,
        slots: IntArray,  # (B,)
        num_tokens: IntArray,  # (B,) at least 1
        positions: IntArray,  # (B,)
        seeds: NDArray[np.uint64],  # (B,)
        temperatures: FloatArray,  # (B,) 0: greedy
        top_ks: IntArray,  # (B,) 0: off
        top_ps: FloatArray,  # (B,) 1: off
        stop_tokens: IntArray,  # (B, S) padded with -1
    ) -> Any: ...

    def collect(self, ticket: Any) -> Any: ...

    def read_rows(self, slots: IntArray) -> FloatArray: ...  # (B, L, state_size)
    def write_rows(self, slots: IntArray, rows: FloatArray) -> None: ...
    def zero_rows(self, slots: IntArray) -> None: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...
