"""Lays whole files end to end in rows and cuts them into chunks for truncated back-propagation.

Symbols: T steps of a chunk, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellserve_model.errors import TrainingError

__all__ = ["ByteStreams", "Chunk"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """T tokens of every row. inputs, targets: (T, B) uint8. keep: (T, B) bool, false where a file starts.

    starts_epoch: the rows begin anew, so the state that is carried from chunk to chunk begins at zero.
    """

    inputs: NDArray[np.uint8]
    targets: NDArray[np.uint8]
    keep: NDArray[np.bool_]
    starts_epoch: bool


class ByteStreams:
    """The chunks of a corpus as a pure function of their number, so that training resumes where it stopped.

    Each epoch joins all files in an order drawn from (seed, epoch) and cuts the text into B rows of equal
    length.
    """

    def __init__(self, files: Sequence[bytes], *, num_rows: int, num_steps: int, seed: int) -> None:
        self._files = [np.frombuffer(content, dtype=np.uint8) for content in files if content]
        self._num_rows, self._num_steps, self._seed = num_rows, num_steps, seed
        num_bytes = sum(len(content) for content in self._files)
        self.chunks_per_epoch = (num_bytes // num_rows - 1) // num_steps
        if self.chunks_per_epoch < 1:
            raise TrainingError(
                f"the corpus has {num_bytes} bytes; {num_rows} rows of {num_steps} steps need at least "
                f"{num_rows * (num_steps + 1)}"
            )
        self._epoch: int | None = None
        self._rows: NDArray[np.uint8]  # (B, bytes of a row)
        self._starts: NDArray[np.bool_]  # (B, bytes of a row), true at the first byte of a file

    def chunk(self, index: int) -> Chunk:
        epoch, within = divmod(index, self.chunks_per_epoch)
        if epoch != self._epoch:
            self._lay_out(epoch)
        first, last = within * self._num_steps, (within + 1) * self._num_steps
        return Chunk(
            inputs=np.ascontiguousarray(self._rows[:, first:last].T),
            targets=np.ascontiguousarray(self._rows[:, first + 1 : last + 1].T),
            keep=np.ascontiguousarray(~self._starts[:, first + 1 : last + 1].T),
            starts_epoch=within == 0,
        )

    def _lay_out(self, epoch: int) -> None:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._files))
        text = np.concatenate([self._files[number] for number in order])
        starts = np.zeros(len(text), dtype=np.bool_)
        ends = np.cumsum([len(self._files[number]) for number in order])
        starts[0] = True
        starts[ends[:-1]] = True
        length = len(text) // self._num_rows
        used = length * self._num_rows  # the few bytes left over are other ones in every epoch
        self._rows = text[:used].reshape(self._num_rows, length)
        self._starts = starts[:used].reshape(self._num_rows, length)
        self._epoch = epoch
