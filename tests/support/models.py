"""Writes small random models in the file format, without the product's own writer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

__all__ = ["CELLS", "write_tiny_model"]

# Row blocks of each cell's weights, as DESIGN.md section 3 lays them out.
_NUM_BLOCKS = {
    "vanilla_rnn": 1,
    "leaky_rnn": 1,
    "simplified_gru": 2,
    "gru": 3,
    "gru_reset_after": 3,
    "lstm": 4,
}
CELLS = tuple(_NUM_BLOCKS)
_EMBEDDING_SIZE = 5


def write_tiny_model(
    directory: Path,
    cell: str,
    *,
    num_layers: int = 1,
    hidden_size: int = 8,
    vocab_size: int | None = None,
    input_size: int | None = None,
    output_size: int | None = None,
    seed: int = 0,
) -> Path:
    """Write config.json and model.safetensors of a random model into `directory` and return it.

    Exactly one of `vocab_size` (token input) and `input_size` (vector input) is given. The weights are large
    enough for every gate to move.
    """
    assert (vocab_size is None) != (input_size is None), "give vocab_size or input_size"
    random = np.random.default_rng(seed)
    rows = _NUM_BLOCKS[cell] * hidden_size

    def weights(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    tensors: dict[str, NDArray[np.float32]] = {}
    if vocab_size is not None:
        tensors["embedding"] = weights(vocab_size, _EMBEDDING_SIZE)
    below = _EMBEDDING_SIZE if input_size is None else input_size
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        tensors[prefix + "input_weight"] = weights(rows, below, scale=below**-0.5)
        tensors[prefix + "recurrent_weight"] = weights(rows, hidden_size, scale=hidden_size**-0.5)
        tensors[prefix + "bias"] = weights(rows, scale=0.5)
        if cell == "gru_reset_after":
            tensors[prefix + "recurrent_bias"] = weights(hidden_size, scale=0.5)
        if cell == "leaky_rnn":
            tensors[prefix + "leak"] = np.array(random.uniform(0.2, 0.8), dtype=np.float32)
        below = hidden_size
    if output_size is not None:
        tensors["head.weight"] = weights(output_size, hidden_size, scale=2 * hidden_size**-0.5)
        tensors["head.bias"] = weights(output_size, scale=0.5)
    described: dict[str, object] = (
        {"kind": "vectors", "input_size": input_size}
        if vocab_size is None
        else {"kind": "tokens", "vocab_size": vocab_size, "embedding_size": _EMBEDDING_SIZE}
    )
    config = {
        "format": 1,
        "cell": cell,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "input": described,
        "output_size": output_size,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory
