"""Who asked for the unfinished runs of a model, and their tokens: what is forgotten of a run once it has finished."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellserve_service.pools import Pool, slices
from cellserve_service.stepping import IntArray
from cellserve_service.tables import Table

_NOBODY = 0  # no stream


class Requests(Table):
    """A request for each unfinished run that somebody waits for: of runs and generates, but not of operations."""

    COLUMNS: ClassVar[tuple[tuple[str, type], ...]] = (
        ("run", np.int64),
        ("stream", np.int64),
        ("number", np.uint64),  # the stream's own for the request
        ("accepted_at", np.float64),
        ("deadline", np.float64),
        ("tokens", np.int64),  # offset in the token pool
        ("num_tokens", np.int64),  # in the token pool
        ("done", np.int64),  # tokens that have run
    )

    def __init__(self, token_dtype: type[Any], token_width: int) -> None:
        super().__init__(1024)
        self.token_pool: Pool[Any] = Pool(token_dtype, token_width, self._live_tokens, self._tokens_moved)

    run: IntArray
    stream: IntArray
    number: NDArray[np.uint64]
    accepted_at: NDArray[np.float64]
    deadline: NDArray[np.float64]
    tokens: IntArray
    num_tokens: IntArray
    done: IntArray

    def allocate(self, runs: IntArray) -> IntArray:
        """A request for each of some runs, without tokens."""
        asked = self._take(len(runs))
        self.run[asked] = runs
        self.done[asked] = 0
        return asked

    def put_tokens(self, asked: IntArray, counts: IntArray, tokens: NDArray[Any]) -> None:
        """Keep the tokens of requests: (N,) or (N, I), one request's behind the other's."""
        number = len(tokens)
        offset = self.token_pool.allocate(number)
        self.token_pool.rows[offset : offset + number] = tokens.reshape(number, -1)
        starts = np.arange(number) if number == len(asked) else counts.cumsum() - counts
        self.tokens[asked] = offset + starts
        self.num_tokens[asked] = counts

    def num_left(self, asked: IntArray) -> IntArray:
        """How many tokens of requests have not run."""
        left: IntArray = self.num_tokens[asked] - self.done[asked]
        return left

    def discard(self, asked: IntArray) -> None:
        """The requests are answered."""
        self.token_pool.release(int(np.add.reduce(self.num_tokens[asked])))
        self.num_tokens[asked] = 0
        self.stream[asked] = _NOBODY
        self._give_back(asked)

    def of_stream(self, stream: int) -> IntArray:
        """All requests of a stream."""
        return np.flatnonzero(self.stream == stream)

    def _live_tokens(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        for asked in slices(self.num_tokens):
            yield asked, self.tokens[asked], self.num_tokens[asked]

    def _tokens_moved(self, asked: IntArray, offsets: IntArray) -> None:
        self.tokens[asked] = offsets
