"""Growing arrays that many runs share: rows at offsets, compacted when they run out."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import IntArray

Scalar = TypeVar("Scalar", bound=np.generic)

_SLICE = 1 << 14


def slices(column: NDArray[Any]) -> Iterator[IntArray]:
    """The indices at which a column is above zero, some at a time."""
    for first in range(0, len(column), _SLICE):
        yield first + np.flatnonzero(column[first : first + _SLICE] > 0)


def stretches(column: NDArray[Any]) -> tuple[IntArray, IntArray]:
    """Where stretches of equal numbers begin, and how long they are. column: (n,), n at least 1."""
    if column[0] == column[-1] and not np.count_nonzero(column != column[0]):
        return np.zeros(1, np.int64), np.array([len(column)])
    firsts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    return firsts, np.diff(np.append(firsts, len(column)))


def ragged_indices(starts: IntArray, counts: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then the same for every other row: (counts.sum(),)."""
    before = counts.cumsum() - counts
    indices: IntArray = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return indices


class Pool(Generic[Scalar]):
    """Rows of `width` numbers in one array. Its users keep offset and count of what they put here.

    When the pool must be compacted, `live` gives what is in it as (owners, offsets, counts), some at a time, for the
    indices of a million are many times as large as what they are for; `moved` takes the new offsets of some owners.
    A compaction looks through all owners: `least_rows`, the smallest size, is what is put here between two at least.
    """

    def __init__(
        self,
        dtype: type[Scalar],
        width: int,
        live: Callable[[], Iterator[tuple[IntArray, IntArray, IntArray]]],
        moved: Callable[[IntArray, IntArray], None],
        least_rows: int = 1024,
    ) -> None:
        self.rows: NDArray[Scalar] = np.empty((least_rows, width), dtype)
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
        wanted = self.num_live + num_rows
        rows, size = self.rows, len(self.rows)
        self.rows = np.empty((size if 2 * wanted <= size else 4 * wanted, rows.shape[1]), rows.dtype)
        self._used = 0
        for owners, offsets, counts in self._live():
            source = ragged_indices(offsets, counts)
            self.rows[self._used : self._used + len(source)] = rows[source]
            self._moved(owners, self._used + counts.cumsum() - counts)
            self._used += len(source)
        assert self._used == self.num_live
