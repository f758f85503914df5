"""Growing arrays that many runs share: rows at offsets, compacted when they run out."""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import IntArray

Scalar = TypeVar("Scalar", bound=np.generic)


def ragged_indices(starts: IntArray, counts: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then the same for every other row: (counts.sum(),)."""
    before = counts.cumsum() - counts
    indices: IntArray = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return indices


class Pool(Generic[Scalar]):
    """Rows of `width` numbers in one array. Its users keep offset and count of what they put here.

    `live` gives the owner's rows as (offsets, counts) when the pool must be compacted; `moved` takes their new offsets.
    A compaction costs no more than what was put here since the last one.
    """

    def __init__(
        self,
        dtype: type[Scalar],
        width: int,
        live: Callable[[], tuple[IntArray, IntArray]],
        moved: Callable[[IntArray], None],
    ) -> None:
        self.rows: NDArray[Scalar] = np.empty((1024, width), dtype)
        self.num_live = 0
        self._used = 0
        self._live = live
        self._moved = moved

    def allocate(self, num_rows: int) -> int:
        """Room for `num_rows` rows; returns the offset of the first."""
        if self._used + num_rows > len(self.rows):
            self._compact(num_rows)
        offset = self._used
        self._used += num_rows
        self.num_live += num_rows
        return offset

    def release(self, num_rows: int) -> None:
        """So many rows are no longer live."""
        self.num_live -= num_rows
        if self.num_live == 0:
            self._used = 0

    def _compact(self, num_rows: int) -> None:
        offsets, counts = self._live()
        source = ragged_indices(offsets, counts)
        assert len(source) == self.num_live
        target = self.rows
        if 2 * (len(source) + num_rows) > len(self.rows):
            target = np.empty((4 * (len(source) + num_rows), self.rows.shape[1]), self.rows.dtype)
        target[: len(source)] = self.rows[source]
        self.rows = target
        self._used = len(source)
        self._moved(counts.cumsum() - counts)
