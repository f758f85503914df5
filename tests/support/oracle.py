"""DESIGN.md's equations transcribed once more, in float64 numpy: the oracle from outside.

It reads the files by itself and shares no line with the product. Symbols: T tokens, L layers, H hidden size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

__all__ = ["Oracle", "Trace"]

Array = NDArray[np.float64]


def _sigmoid(values: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-values))
    return result


@dataclass(frozen=True)
class Trace:
    """One sequence. states: (T, L, state_size) after each token. gates: (T, num_gates, L, H).

    logits: (T + 1, O), the head before the first token and after each; O = 0 without a head.
    """

    states: Array
    gates: Array
    logits: Array

    def logprobs(self, tokens: NDArray[Any]) -> Array:
        """ln p(x_t | x_1 .. x_{t-1}): (T,), from the head on what came before each token."""
        before = self.logits[:-1]
        top = before.max(axis=1, keepdims=True)
        normalised = before - top - np.log(np.exp(before - top).sum(axis=1, keepdims=True))
        chosen: Array = normalised[np.arange(len(tokens)), np.asarray(tokens, dtype=np.int64)]
        return chosen


class Oracle:
    """A model directory, run one sequence at a time."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        loaded = load_file(directory / "model.safetensors")
        self._tensors: dict[str, Array] = {name: value.astype(np.float64) for name, value in loaded.items()}
        self._hidden_size = int(self.config["hidden_size"])
        self._state_size = self._hidden_size * (2 if self.config["cell"] == "lstm" else 1)

    def run(self, inputs: Any, state: Array | None = None) -> Trace:
        """Run T tokens, ids (T,) or vectors (T, I), from `state` (L, state_size), by default position 0."""
        num_layers = int(self.config["num_layers"])
        current = np.zeros((num_layers, self._state_size)) if state is None else np.array(state, dtype=np.float64)
        states, gates = [], []
        logits = [self._head(current)]
        for token in inputs:
            if self.config["input"]["kind"] == "tokens":
                given = self._tensors["embedding"][int(token)]
            else:
                given = np.asarray(token, dtype=np.float64)
            layer_gates = []
            for layer in range(num_layers):
                current[layer], found = self._cell(layer, given, current[layer])
                layer_gates.append(found)
                given = current[layer, : self._hidden_size]
            states.append(current.copy())
            gates.append(np.stack(layer_gates, axis=1))
            logits.append(self._head(current))
        shape = (0, num_layers)
        return Trace(
            states=np.stack(states) if states else np.empty((*shape, self._state_size)),
            gates=np.stack(gates) if gates else np.empty((0, 0, num_layers, self._hidden_size)),
            logits=np.stack(logits),
        )

    def _head(self, state: Array) -> Array:
        if self.config["output_size"] is None:
            return np.empty(0)
        result: Array = self._tensors["head.weight"] @ state[-1, : self._hidden_size] + self._tensors["head.bias"]
        return result

    def _cell(self, layer: int, x: Array, state: Array) -> tuple[Array, Array]:
        """One layer, one token: the new state (state_size,) and the gates (num_gates, H)."""
        size = self._hidden_size
        prefix = f"layers.{layer}."
        weight = self._tensors[prefix + "recurrent_weight"]
        from_input = self._tensors[prefix + "input_weight"] @ x + self._tensors[prefix + "bias"]

        def w(block: int) -> Array:
            return weight[block * size : (block + 1) * size]

        def u(block: int) -> Array:
            return from_input[block * size : (block + 1) * size]

        h = state[:size]
        match self.config["cell"]:
            case "vanilla_rnn":
                return np.tanh(w(0) @ h + u(0)), np.empty((0, size))
            case "leaky_rnn":
                leak = float(self._tensors[prefix + "leak"])
                g = np.tanh(w(0) @ h + u(0))
                return (1 - leak) * g + leak * h, np.full((1, size), leak)
            case "simplified_gru":
                f = _sigmoid(w(0) @ h + u(0))
                g = np.tanh(w(1) @ h + u(1))
                return f * h + (1 - f) * g, f[None]
            case "gru":
                z, r = _sigmoid(w(0) @ h + u(0)), _sigmoid(w(1) @ h + u(1))
                g = np.tanh(w(2) @ (r * h) + u(2))
                return z * h + (1 - z) * g, np.stack((z, r))
            case "gru_reset_after":
                z, r = _sigmoid(w(0) @ h + u(0)), _sigmoid(w(1) @ h + u(1))
                g = np.tanh(u(2) + r * (w(2) @ h + self._tensors[prefix + "recurrent_bias"]))
                return z * h + (1 - z) * g, np.stack((z, r))
            case "lstm":
                c = state[size:]
                i, f, o = (_sigmoid(w(block) @ h + u(block)) for block in (0, 1, 3))
                c = f * c + i * np.tanh(w(2) @ h + u(2))
                return np.concatenate((o * np.tanh(c), c)), np.stack((i, f, o))
            case other:
                raise AssertionError(f"no such cell: {other}")
