"""Tables of columns: rows of numbers that are taken, given back, and grow in number."""

import mmap
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import IntArray

Int32Array = NDArray[np.int32]

_LARGE = 4 << 20  # bytes


def zeros(number: int, dtype: Any) -> NDArray[Any]:
    """Zeros in pages of their own, which take no memory until they are written to: (number,).

    Numpy's own zeros are like that only where malloc has no memory to use again.
    """
    size = max(1, number * np.dtype(dtype).itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and len(pages) >= _LARGE:
        pages.madvise(mmap.MADV_HUGEPAGE)  # a million rows in small pages miss the TLB as often as the cache
    return np.frombuffer(pages, dtype, number)


class Table:
    """A subclass names its columns, widest first, and declares an attribute for each.

    The columns are views of one array of records. A million rows are in no cache, and a step touches most columns of
    its rows: so all numbers of a row come from memory at once. Reading a whole column is the slower for it.

    Numbers are as narrow as a million rows make worth it. For few rows numpy takes indices that are no int64, and
    values of another type than the column's, ten times as slowly as others, and `column[rows] += n` twice as slowly as
    `column[rows] = column[rows] + n`: the way of a step is written accordingly.
    """

    COLUMNS: ClassVar[tuple[tuple[str, type], ...]]

    def __init__(self, capacity: int) -> None:
        self.capacity = 0
        self._dtype = np.dtype(list(self.COLUMNS), align=True)
        self._records: NDArray[Any] = np.empty(0, self._dtype)
        self._free: Int32Array = np.empty(0, np.int32)
        self._num_free = 0
        self._grow(capacity)

    @property
    def num_free(self) -> int:
        return self._num_free

    def __len__(self) -> int:
        return self.capacity - self._num_free

    def _take(self, number: int) -> IntArray:
        """So many free rows, as they were left."""
        if number > self._num_free:
            self._grow(max(2 * self.capacity, self.capacity + number))
        self._num_free -= number
        return self._free[self._num_free : self._num_free + number].astype(np.int64)

    def _give_back(self, rows: IntArray) -> None:
        self._free[self._num_free : self._num_free + len(rows)] = rows
        self._num_free += len(rows)

    def _grow(self, capacity: int) -> None:
        assert capacity <= 2**31  # int32 tells rows
        records = zeros(capacity, self._dtype)
        records[: self.capacity] = self._records
        self._records = records
        for name, _ in self.COLUMNS:
            setattr(self, name, records[name])
        free = np.empty(capacity, np.int32)
        free[: self._num_free] = self._free[: self._num_free]
        added = capacity - self.capacity
        free[self._num_free : self._num_free + added] = np.arange(capacity - 1, self.capacity - 1, -1)
        self._free = free
        self._num_free += added
        self.capacity = capacity
