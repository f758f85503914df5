"""Shapes of models that the project has not seen: odd sizes, several layers, tokens or vectors, head or none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.models import CELLS, write_tiny_model

__all__ = ["UNSEEN", "UnseenModel", "write_unseen_models"]


@dataclass(frozen=True)
class UnseenModel:
    """One shape, written for every cell. Of several versions the largest integer serves."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int | None = None
    input_size: int | None = None
    output_size: int | None = None
    versions: tuple[int, ...] = (1,)

    @property
    def version(self) -> int:
        return max(self.versions)

    def directory_name(self, cell: str) -> str:
        return f"{self.name}-{cell}"

    def tokens(self, random: np.random.Generator, number: int) -> NDArray[Any]:
        """Random tokens: ids (n,), or float32 vectors (n, I)."""
        if self.vocab_size is not None:
            return random.integers(0, self.vocab_size, number)
        assert self.input_size is not None
        return random.standard_normal((number, self.input_size)).astype(np.float32)


UNSEEN = (
    UnseenModel("odd", 1, 7, vocab_size=13, output_size=13),
    UnseenModel("deep", 3, 33, vocab_size=50, output_size=50, versions=(2, 10, 9)),
    UnseenModel("headless", 2, 33, vocab_size=5),
    UnseenModel("sensor", 2, 33, input_size=5, output_size=4),
    UnseenModel("bare", 3, 7, input_size=1),
    UnseenModel("least", 1, 1, vocab_size=1, output_size=1),
)


def write_unseen_models(directory: Path) -> Path:
    """Write every shape for every cell; returns the directory."""
    for shape, model in enumerate(UNSEEN):
        for place, cell in enumerate(CELLS):
            for version in model.versions:
                write_tiny_model(
                    directory / model.directory_name(cell) / str(version),
                    cell,
                    num_layers=model.num_layers,
                    hidden_size=model.hidden_size,
                    vocab_size=model.vocab_size,
                    input_size=model.input_size,
                    output_size=model.output_size,
                    seed=1000 * shape + 100 * place + version,
                )
    return directory
