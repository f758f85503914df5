"""What passes between the stepper and whoever drives it: numpy arrays in frozen records, no torch.

Symbols: B rows of a tick, N tokens of a tick, L layers, H hidden size, O output size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["GenerateResult", "ModelInfo", "StepResult", "Want"]


class Want(IntFlag):
    """The outputs that can be asked for at a token; combined bit by bit in a uint8."""

    NEXT_TOKEN = 1
    TOP_K = 2
    LOGPROB = 4
    LOGITS = 8
    STATE = 16
    GATES = 32


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is; sizes as in config.json. state_size: H, for lstm 2H (h, then c)."""

    name: str
    version: int
    fingerprint: bytes  # 32 bytes
    cell: str
    num_layers: int
    hidden_size: int
    state_size: int
    input_kind: Literal["tokens", "vectors"]
    vocab_size: int | None
    input_size: int | None
    output_size: int | None
    gate_names: tuple[str, ...]
    num_parameters: int
    device: str  # "cpu", "cuda:0"


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outputs of one tick: each has one row for each token that asked for it, row after row of the tick.

    next_tokens: argmax head(h_t). top_tokens, top_logprobs: the k likeliest next tokens, likeliest first,
    natural logarithm. logprobs: log softmax(head(h_{t-1}))[x_t]. logits: head(h_t). states: after the token,
    lstm h then c.
    """

    next_tokens: NDArray[np.uint32]  # (n,)
    top_tokens: NDArray[np.uint32]  # (n, k)
    top_logprobs: NDArray[np.float32]  # (n, k)
    logprobs: NDArray[np.float32]  # (n,)
    logits: NDArray[np.float32]  # (n, O)
    states: NDArray[np.float32]  # (n, L, state_size)
    gates: NDArray[np.float32]  # (n, num_gates, L, H)
    num_padding_rows: int
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The sampled tokens of one tick, all of them consumed.

    tokens, logprobs: the first counts[b] of row b are real; logprobs under the model's own distribution,
    before temperature, top-k and top-p.
    """

    tokens: NDArray[np.uint32]  # (B, num_tokens)
    logprobs: NDArray[np.float32]  # (B, num_tokens)
    counts: NDArray[np.int64]  # (B,)
    num_padding_rows: int
    compute_seconds: float
