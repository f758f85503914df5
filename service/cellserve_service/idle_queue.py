"""Session rows, those first that may have been idle longest: so that expiry looks at few sessions at a time."""

import math
from array import array

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import IntArray
from cellserve_service.tables import zeros


class IdleQueue:
    """Rows below `capacity` in buckets, one for each second in which they were last known to be used.

    A row does not move when its session is used. Its turn comes when it could have been idle for long enough, and who
    takes it puts it back where its last use belongs: so each row is looked at about once in an idle timeout, whatever
    happens to its session meanwhile. It costs 5 bytes. A row stays where it is when its session ends, and serves the
    next session that gets it: that one is looked at too early, once.
    """

    def __init__(self, capacity: int) -> None:
        self._is_here = zeros(capacity, np.bool_)
        self._buckets: dict[int, array[int]] = {}  # by second
        self._due = np.empty(0, np.int32)  # rows of buckets whose turn has come

    @property
    def has_due(self) -> bool:
        """Whether the last `take` has left rows whose turn had come."""
        return len(self._due) > 0

    def put(self, rows: IntArray, used_at: float) -> None:
        """Put in rows that were all last used at a moment; those that are in it already stay where they are."""
        rows = rows[~self._is_here[rows]]
        self._is_here[rows] = True
        bucket = self._buckets.setdefault(math.floor(used_at), array("i"))
        bucket.frombytes(rows.astype(np.int32).tobytes())

    def put_back(self, rows: IntArray, used_at: NDArray[np.float64]) -> None:
        """Put in rows that were taken. used_at: (n,) when each was last used."""
        seconds = np.floor(used_at)
        for second in np.unique(seconds).tolist():
            self.put(rows[seconds == second], second)

    def take(self, before: float, most: int) -> IntArray:
        """Take out at most so many rows; all that were last used before a moment are among them, or come next."""
        if not len(self._due):
            turns = sorted(second for second in self._buckets if second < before)
            if not turns:
                return np.empty(0, np.int64)
            self._due = np.concatenate([np.frombuffer(self._buckets.pop(second), np.int32) for second in turns])
        rows, self._due = self._due[:most].astype(np.int64), self._due[most:]
        self._is_here[rows] = False
        return rows
