"""The cells in float64 by plain numpy: what every timed step must have computed.

The equations of the README and of Cho et al. (2014), Chung et al. (2014) and Hochreiter & Schmidhuber (1997), straight
from a model's file. Symbols: B rows, H hidden size, G row blocks, V vocabulary, E embedding, I input size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

__all__ = ["NUM_CHECKED_STEPS", "TOLERANCE", "Reference", "WrongAnswerError"]

# float32 against float64 over the steps that are compared, for cells that forget.
TOLERANCE: Final = 2e-5
NUM_CHECKED_STEPS: Final = 64

Floats = npt.NDArray[np.float64]


class WrongAnswerError(Exception):
    """A step has computed something else than float64 does: its speed is of no interest."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One layer of a cell, with the embedding before it and the head behind it where the file has them."""

    cell: str
    weights: Mapping[str, Floats]

    @classmethod
    def of(cls, directory: Path, cell: str) -> Reference:
        """Read a model directory."""
        tensors = load_file(directory / "model.safetensors")
        weights = {name.removeprefix("layers.0."): tensor.astype(np.float64) for name, tensor in tensors.items()}
        return cls(cell, weights)

    def zero_state(self, num_rows: int) -> Floats:
        """(B, H), for `lstm` (B, 2H)."""
        hidden_size = self.weights["recurrent_weight"].shape[1]
        return np.zeros((num_rows, hidden_size * (2 if self.cell == "lstm" else 1)))

    def advance(self, state: Floats, tokens: npt.NDArray[np.generic]) -> Floats:
        """One step. state: as zero_state. tokens: (B,) ids, or (B, I) vectors."""
        weights = self.weights
        hidden_size = weights["recurrent_weight"].shape[1]
        below = weights["embedding"][tokens.astype(np.int64)] if "embedding" in weights else tokens.astype(np.float64)
        hidden = state[:, :hidden_size]
        given = below @ weights["input_weight"].T + weights["bias"]  # (B, G*H)
        recurrent = weights["recurrent_weight"]  # (G*H, H)

        def block(number: int) -> Floats:
            """W_x x + b + W_h h of one row block."""
            rows = slice(number * hidden_size, (number + 1) * hidden_size)
            return given[:, rows] + hidden @ recurrent[rows].T

        if self.cell == "vanilla_rnn":
            return np.tanh(block(0))
        if self.cell == "leaky_rnn":
            leak = weights["leak"]
            return (1 - leak) * np.tanh(block(0)) + leak * hidden
        if self.cell == "simplified_gru":
            forget, candidate = _sigmoid(block(0)), np.tanh(block(1))
            return forget * hidden + (1 - forget) * candidate
        if self.cell == "lstm":
            memory = _sigmoid(block(1)) * state[:, hidden_size:] + _sigmoid(block(0)) * np.tanh(block(2))
            return np.concatenate([_sigmoid(block(3)) * np.tanh(memory), memory], axis=1)
        update, reset = _sigmoid(block(0)), _sigmoid(block(1))
        last = slice(2 * hidden_size, 3 * hidden_size)
        if self.cell == "gru":
            candidate = np.tanh(given[:, last] + (reset * hidden) @ recurrent[last].T)
        else:
            candidate = np.tanh(given[:, last] + reset * (hidden @ recurrent[last].T + weights["recurrent_bias"]))
        return update * hidden + (1 - update) * candidate

    def head(self, state: Floats) -> Floats:
        """Logits (B, V)."""
        hidden = state[:, : self.weights["head.weight"].shape[1]]
        return hidden @ self.weights["head.weight"].T + self.weights["head.bias"]


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
