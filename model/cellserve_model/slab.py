"""The slab: all resident states of a model in one preallocated array, one row for each slot.

Slot 0 is scratch, for padding rows; it belongs to no session. Symbols: S slots, L layers, H hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.errors import DeviceError

__all__ = ["Slab", "to_tensor"]


class Slab:
    """States by slot: `rows` is (S + 1, L * S'), S' the padded numbers of a layer's state.

    width: H', the padded hidden size. Raises DeviceError where the memory is not to be had.
    """

    def __init__(self, config: ModelConfig, num_slots: int, width: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; a slab has at least one slot")
        self.num_slots = num_slots
        self._shape = (config.num_layers, config.spec.state_vectors, width)
        self._hidden_size, self._state_size = config.hidden_size, config.state_size
        shape = (num_slots + 1, config.num_layers * config.spec.state_vectors * width)
        try:
            # numpy's zeros are pages that cost nothing until a session first uses its slot.
            self._array = np.zeros(shape, dtype=np.float32)
        except MemoryError as error:
            gibibytes = 4 * shape[0] * shape[1] / 2**30
            raise DeviceError(
                f"{num_slots} slots need {gibibytes:.1f} GiB of memory, which are not free; use fewer slots"
            ) from error
        self.rows = torch.from_numpy(self._array)

    def gather(self, slots: Tensor, out: Tensor) -> None:
        """Copy the rows of `slots` (B,) int64 to `out` (B, L * S')."""
        torch.index_select(self.rows, 0, slots, out=out)

    def scatter(self, slots: Tensor, states: Tensor) -> None:
        """Copy `states` (B, L * S') to the rows of `slots` (B,) int64; slot 0 may come repeatedly."""
        self._array[slots.numpy()] = states.numpy()  # three times as fast as torch's own

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copy states out: (B, L, state_size) float32."""
        gathered = self.rows.index_select(0, to_tensor(slots)).view(-1, *self._shape)
        states = gathered[..., : self._hidden_size].reshape(len(slots), self._shape[0], self._state_size)
        copied: NDArray[np.float32] = states.numpy()
        return copied

    def write(self, slots: NDArray[np.int64], states: NDArray[np.float32]) -> None:
        """Overwrite whole states. slots: unique. states: (B, L, state_size) float32."""
        wanted = (len(slots), self._shape[0], self._state_size)
        if states.shape != wanted:
            raise ValueError(f"states have shape {states.shape}; these slots hold {wanted}")
        rows = self.rows.new_zeros(len(slots), *self._shape)
        given = to_tensor(np.asarray(states, dtype=np.float32))
        rows[..., : self._hidden_size] = given.view(len(slots), *self._shape[:2], self._hidden_size)
        self.scatter(to_tensor(slots), rows.flatten(1))

    def zero(self, slots: NDArray[np.int64]) -> None:
        self.rows.index_fill_(0, to_tensor(slots), 0.0)

    def copy(self, source_slots: NDArray[np.int64], target_slots: NDArray[np.int64]) -> None:
        """Copy states from slot to slot, all read before any is written. target_slots: unique."""
        sources = self.rows.index_select(0, to_tensor(source_slots))
        self.scatter(to_tensor(target_slots), sources)


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    """An array as a tensor, of the same memory where torch may write to it."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()  # torch warns of memory that it may not write to
    return torch.from_numpy(array)
