"""Random models for the benchmarks, in the project's file format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

__all__ = ["CELLS", "EMBEDDING_SIZE", "VOCAB_SIZE", "write_model"]

VOCAB_SIZE: Final = 256
EMBEDDING_SIZE: Final = 96  # as the bundled model's
CELLS: Final = {"vanilla_rnn": 1, "leaky_rnn": 1, "simplified_gru": 2, "gru": 3, "gru_reset_after": 3, "lstm": 4}
# Below 1 the recurrence forgets, so that rounding errors do not grow over hundreds of steps.
_RECURRENT_SCALE: Final = 0.7


def write_model(
    directory: Path, cell: str, hidden_size: int, *, input_size: int | None = None, has_head: bool = False
) -> Path:
    """Write one layer of a cell into <directory>/1 and return that. input_size: of vectors; None: 256 tokens."""
    random = np.random.default_rng(hidden_size)
    rows, below = CELLS[cell] * hidden_size, input_size or EMBEDDING_SIZE

    def weights(*shape: int, scale: float) -> npt.NDArray[np.float32]:
        return (scale * random.standard_normal(shape, np.float32)).astype(np.float32)

    tensors = {
        "layers.0.input_weight": weights(rows, below, scale=below**-0.5),
        "layers.0.recurrent_weight": weights(rows, hidden_size, scale=_RECURRENT_SCALE * hidden_size**-0.5),
        "layers.0.bias": weights(rows, scale=0.3),
    }
    if cell == "gru_reset_after":
        tensors["layers.0.recurrent_bias"] = weights(hidden_size, scale=0.3)
    if cell == "leaky_rnn":
        tensors["layers.0.leak"] = np.array(0.5, np.float32)
    if input_size is None:
        tensors["embedding"] = weights(VOCAB_SIZE, EMBEDDING_SIZE, scale=1.0)
    if has_head:
        tensors["head.weight"] = weights(VOCAB_SIZE, hidden_size, scale=2 * hidden_size**-0.5)
        tensors["head.bias"] = weights(VOCAB_SIZE, scale=0.3)
    given: dict[str, object] = {"kind": "vectors", "input_size": input_size}
    if input_size is None:
        given = {"kind": "tokens", "vocab_size": VOCAB_SIZE, "embedding_size": EMBEDDING_SIZE}
    config = {
        "format": 1,
        "cell": cell,
        "num_layers": 1,
        "hidden_size": hidden_size,
        "input": given,
        "output_size": VOCAB_SIZE if has_head else None,
    }
    version = directory / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "config.json").write_text(json.dumps(config))
    save_file(tensors, version / "model.safetensors")
    return version
