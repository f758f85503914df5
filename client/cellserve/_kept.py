"""The tokens that a session has consumed and that are not yet safe in the server's state store.

A server that dies comes back with the session as it was stored last; the client gives it these tokens again.
"""

from __future__ import annotations

from array import array
from collections import deque

import numpy as np

from cellserve._tokens import TokenColumn, VectorColumn

__all__ = ["KeptTokens", "KeptVectors"]


class KeptTokens:
    """Token ids from position `start` to position `end`."""

    __slots__ = ("append", "start", "tokens")

    def __init__(self, start: int) -> None:
        self.start = start
        self.tokens = array("I")
        self.append = self.tokens.append  # one more token: the hot path

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def add(self, column: int | TokenColumn | VectorColumn) -> None:
        """The tokens of the next run."""
        if isinstance(column, int):
            self.tokens.append(column)
        else:
            assert isinstance(column, array)
            self.tokens.extend(column)

    def prune(self, position: int) -> None:
        """Tokens before position are safe."""
        num_safe = min(position - self.start, len(self.tokens))
        if num_safe > 0:
            del self.tokens[:num_safe]
            self.start += num_safe

    def cut(self, begin: int, end: int) -> TokenColumn | VectorColumn:
        """The tokens from position begin to position end."""
        return self.tokens[begin - self.start : end - self.start]

    def restart(self, position: int) -> None:
        """Nothing is kept any more; the session stands at position."""
        self.start = position
        del self.tokens[:]


class KeptVectors:
    """Feature vectors from position `start` to position `end`, run by run."""

    __slots__ = ("_num_vectors", "_runs", "start")

    def __init__(self, start: int) -> None:
        self.restart(start)

    @property
    def end(self) -> int:
        return self.start + self._num_vectors

    def append(self, token: int) -> None:
        raise TypeError(f"a model of vectors has no token {token}")

    def add(self, column: int | TokenColumn | VectorColumn) -> None:
        """The vectors of the next run."""
        assert isinstance(column, np.ndarray)
        self._runs.append(column)
        self._num_vectors += len(column)

    def prune(self, position: int) -> None:
        """Vectors before position are safe."""
        num_safe = min(position - self.start, self._num_vectors)
        if num_safe <= 0:
            return
        self.start += num_safe
        self._num_vectors -= num_safe
        while num_safe and num_safe >= len(self._runs[0]):
            num_safe -= len(self._runs.popleft())
        if num_safe:
            self._runs[0] = self._runs[0][num_safe:]

    def cut(self, begin: int, end: int) -> TokenColumn | VectorColumn:
        """The vectors from position begin to position end."""
        return np.concatenate(self._runs)[begin - self.start : end - self.start]

    def restart(self, position: int) -> None:
        """Nothing is kept any more; the session stands at position."""
        self.start = position
        self._num_vectors = 0
        self._runs: deque[VectorColumn] = deque()
