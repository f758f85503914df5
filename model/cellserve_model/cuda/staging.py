"""Moves arrays to the device without waiting, and a tick's plan into the arrays that a run is told.

Symbols: B rows of a tick, B' rows of its bucket, T steps, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.cuda.slab import split_halves
from cellserve_model.plan import Capture, HeadPlan, TokenPlan

__all__ = ["places_by_step", "positions_of", "tile_counts", "upload", "upload_columns", "vectors_in_halves"]


def upload_columns(target: Tensor, columns: Sequence[NDArray[np.generic]]) -> None:
    """Overwrite target (n, B') int32, contiguous, with columns of at most B' numbers, zeros behind them.

    The copy goes through pinned memory and does not wait. Torch hands a pinned block out again only when the
    copies from it have ended, so the blocks of the ticks under way are a ring of buffers.
    """
    staging = torch.zeros(target.shape, dtype=torch.int32, pin_memory=target.device.type == "cuda")
    for row, column in zip(staging.numpy(), columns, strict=True):
        row[: len(column)] = column
    target.copy_(staging, non_blocking=True)


def upload(array: NDArray[np.generic], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """A new tensor on the device; the copy goes through pinned memory and does not wait."""
    staging = torch.empty(array.shape, dtype=dtype, pin_memory=device.type == "cuda")
    staging.numpy()[...] = array
    return staging.to(device, non_blocking=True)


def vectors_in_halves(vectors: NDArray[np.float32], num_rows: int, width: int, device: torch.device) -> Tensor:
    """(N, I) float32 as (num_rows, 2, width) int16 halves on the device, padded with zeros."""
    staging = torch.zeros(num_rows, 2, width, dtype=torch.int16, pin_memory=device.type == "cuda")
    staging[: len(vectors), :, : vectors.shape[1]] = split_halves(torch.from_numpy(np.ascontiguousarray(vectors)))
    return staging.to(device, non_blocking=True)


def places_by_step(asked: HeadPlan | TokenPlan | None, step_sizes: list[int], num_rows: int) -> NDArray[np.int32]:
    """Where each row's result of each step goes, (T, num_rows), -1 for nowhere."""
    places = np.full((len(step_sizes), num_rows), -1, dtype=np.int32)
    if asked is not None:
        for row, capture, size in zip(places, asked.captures[1:], step_sizes, strict=True):
            if capture is not None:
                row[slice(0, size) if capture.ranks is None else capture.ranks] = positions_of(capture)
    return places


def positions_of(capture: Capture) -> NDArray[np.int64]:
    """The places of a capture as numbers."""
    places = capture.places
    return np.arange(places.start, places.stop) if isinstance(places, slice) else places


def tile_counts(counts: NDArray[np.int64], tile_rows: int) -> NDArray[np.int64]:
    """The steps that each row takes part in, (B,): those of the longest run in its tile. counts: longest first."""
    first_of_tile = np.arange(len(counts)) // tile_rows * tile_rows
    result: NDArray[np.int64] = counts[first_of_tile]
    return result
