"""The slab of a GPU: states in halves, and for each slot the row that holds its state now.

A step reads one row and writes another (see kernels.py), so there are as many rows more than slots as a tick
has rows: a tick takes spare rows for its new states, and the rows that held the old ones are the next spares.
All work goes to one stream, so a row that becomes spare is written only after the tick that reads it.
Symbols: B slots, S slots in all, L layers, H hidden size, W its padded width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.cuda.tiles import padded_width
from cellserve_model.errors import DeviceError

__all__ = ["CudaSlab", "join_halves", "split_halves"]


def split_halves(values: Tensor) -> Tensor:
    """(..., n) float32 to (..., 2, n) int16, high halves and then low ones, as cell_tiles.py has them."""
    bits = values.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return torch.stack((high, bits - (high << 16)), dim=-2).to(torch.int16)


def join_halves(halves: Tensor) -> Tensor:
    """(..., 2, n) int16 to (..., n) float32: what split_halves was given, to the bit."""
    high, low = halves.to(torch.int32).unbind(-2)
    return ((high << 16) + low).view(torch.float32)


class CudaSlab:
    """States by slot. `bits` is (rows, L, vectors of a state, 2, W) int16; row 0 is scratch and of no slot.

    Raises DeviceError where the memory is not to be had.
    """

    def __init__(self, config: ModelConfig, num_slots: int, num_spares: int, device: torch.device) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; a slab has at least one slot")
        self.num_slots = num_slots
        self._config, self._device = config, device
        shape = (1 + num_slots + num_spares, config.num_layers, config.spec.state_vectors, 2)
        try:
            self.bits = torch.zeros(*shape, padded_width(config.hidden_size), dtype=torch.int16, device=device)
        except torch.OutOfMemoryError as error:
            gibibytes = 2 * np.prod(shape) * padded_width(config.hidden_size) / 2**30
            raise DeviceError(
                f"{num_slots} slots need {gibibytes:.1f} GiB on {device}, which are not free; use fewer slots"
            ) from error
        self.halves = self.bits.view(torch.bfloat16)
        self._row_by_slot = np.arange(1 + num_slots)
        self._spares = np.arange(1 + num_slots, 1 + num_slots + num_spares)

    def rows(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows (B,) that hold these slots' states."""
        return self._row_by_slot[slots]

    def take_spares(self, count: int) -> NDArray[np.int64]:
        """Rows (count,) that nobody holds, for the next states of as many slots; good until `move`."""
        return self._spares[:count].copy()

    def move(self, slots: NDArray[np.int64], rows: NDArray[np.int64], spares: NDArray[np.int64]) -> None:
        """From now on the states of `slots` are in `rows`, and `spares`, as many as were taken, are free."""
        self._row_by_slot[slots] = rows
        self._spares[: len(spares)] = spares

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copy states out: (B, L, state_size) float32."""
        found: NDArray[np.float32] = self.gather(self.rows(slots)).cpu().numpy()
        return found

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """The states in rows (B,) of the slab: (B, L, state_size) float32 on the device."""
        halves = self.bits.index_select(0, _to_device(rows, self._device))  # (B, L, vectors, 2, W)
        return join_halves(halves)[..., : self._config.hidden_size].flatten(2)

    def write(self, slots: NDArray[np.int64], states: NDArray[np.float32]) -> None:
        """Overwrite whole states. slots: unique. states: (B, L, state_size) float32."""
        config = self._config
        wanted = (len(slots), config.num_layers, config.state_size)
        if states.shape != wanted:
            raise ValueError(f"states have shape {states.shape}; these slots hold {wanted}")
        given = _to_device(np.asarray(states, dtype=np.float32), self._device)
        rows = self.bits.new_zeros(len(slots), *self.bits.shape[1:])
        shaped = given.view(*wanted[:2], config.spec.state_vectors, config.hidden_size)
        rows[..., : config.hidden_size] = split_halves(shaped)
        self.bits.index_copy_(0, _to_device(self.rows(slots), self._device), rows)

    def zero(self, slots: NDArray[np.int64]) -> None:
        self.bits.index_fill_(0, _to_device(self.rows(slots), self._device), 0)

    def copy(self, source_slots: NDArray[np.int64], target_slots: NDArray[np.int64]) -> None:
        """Copy states from slot to slot, all read before any is written. target_slots: unique."""
        sources = self.bits.index_select(0, _to_device(self.rows(source_slots), self._device))
        self.bits.index_copy_(0, _to_device(self.rows(target_slots), self._device), sources)


def _to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The copy goes through pinned memory and does not wait."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()  # torch warns of memory that it may not write to
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor  # where kernels are interpreted
    return tensor.pin_memory().to(device, non_blocking=True) if array.size else tensor.to(device)
