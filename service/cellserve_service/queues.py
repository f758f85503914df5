"""First in, first out for session rows: which sessions of a model have something to run, oldest first."""

import numpy as np

from cellserve_service.stepping import IntArray
from cellserve_service.tables import zeros

_HOLE = -1


class RowQueue:
    """A ring of session rows below `capacity`. A row stands in it at most once; it can be taken out anywhere."""

    def __init__(self, capacity: int) -> None:
        # What was taken out leaves a hole until it comes to the front, or until the ring is full.
        self._ring = zeros(2 * capacity, np.int32)
        self._place = zeros(capacity, np.int32)
        self._head = 0
        self._length = 0
        self._num_holes = 0

    def __len__(self) -> int:
        return self._length - self._num_holes

    def push(self, rows: IntArray) -> None:
        """Put rows behind all others."""
        self._make_room(len(rows))
        self._put(self._head + self._length, rows)

    def push_front(self, rows: IntArray) -> None:
        """Put rows before all others, the first of them first: they were popped but cannot be taken yet."""
        self._make_room(len(rows))
        self._head = (self._head - len(rows)) % len(self._ring)
        self._put(self._head, rows)

    def pop(self, most: int) -> IntArray:
        """The oldest rows, at most so many; fewer, and perhaps none, where rows had been taken out."""
        number = min(most, self._length)
        rows = self._ring[self._places(self._head, number)].astype(np.int64)
        self._head = (self._head + number) % len(self._ring)
        self._length -= number
        if self._num_holes:
            rows = rows[rows != _HOLE]
            self._num_holes -= number - len(rows)
        return rows

    def remove(self, row: int) -> None:
        """Take out a row, wherever it stands."""
        assert self._ring[self._place[row]] == row
        self._ring[self._place[row]] = _HOLE
        self._num_holes += 1

    def _put(self, first: int, rows: IntArray) -> None:
        places = self._places(first, len(rows))
        self._ring[places] = rows.astype(np.int32)
        self._place[rows] = places.astype(np.int32)
        self._length += len(rows)

    def _places(self, first: int, number: int) -> IntArray:
        places = np.arange(first, first + number)
        return places if first + number <= len(self._ring) else places % len(self._ring)

    def _make_room(self, number: int) -> None:
        if self._length + number <= len(self._ring):
            return
        rows = self._ring[self._places(self._head, self._length)]
        self._length = self._num_holes = 0
        self._put(self._head, rows[rows != _HOLE])
        assert self._length + number <= len(self._ring)
