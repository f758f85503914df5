"""The run table of a model: unfinished runs and held answers as rows of arrays, chained by session.

A session's chain holds its held answers, oldest first, then its unfinished runs in the order in which they were
accepted. Resets, exports and the like that wait for earlier runs stand in the chain as operations; what a generate has
sampled stands in it as held answers, a slice each.
"""

from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cellserve_service.pools import Pool
from cellserve_service.sessions import NO_RUN, SessionTable
from cellserve_service.stepping import IntArray


class Kind:
    """What an entry of a chain is. Plain numbers: numpy compares a column with an enum five times slower."""

    RUN: Final = 0
    GENERATE: Final = 1
    OPERATION: Final = 2


class Status:
    """How far a run is."""

    FREE: Final = 0
    WAITING: Final = 1
    STARTED: Final = 2
    HELD: Final = 3  # finished; its answer, or that there was one, is remembered


NOT_HELD = -1


class RunTable:
    """Runs as arrays; an index into them is a run's number while it lives."""

    _COLUMNS: tuple[tuple[str, type], ...] = (
        ("session", np.int64),  # row of the session table
        ("stream", np.int64),
        ("request", np.uint64),
        ("start", np.int64),  # the position it is for
        ("count", np.int64),  # tokens
        ("done", np.int64),  # tokens that have run
        ("digest", np.uint64),
        ("spec", np.int64),  # index into the model's output specs
        ("tokens", np.int64),  # offset in the token pool, for a RUN that is not finished
        ("held", np.int64),  # offset in the pool of held answers, or NOT_HELD
        ("held_words", np.int64),
        ("next", np.int64),  # the session's next run
        ("accepted_at", np.float64),
        ("deadline", np.float64),
        ("kind", np.uint8),
        ("status", np.uint8),
    )

    def __init__(self, sessions: SessionTable, token_dtype: type[Any], token_width: int) -> None:
        self._sessions = sessions
        self._capacity = 0
        self._free = np.empty(0, np.int64)
        self._num_free = 0
        self.session = self.stream = self.start = self.count = self.done = np.empty(0, np.int64)
        self.spec = self.tokens = self.held = self.held_words = self.next = np.empty(0, np.int64)
        self.request = self.digest = np.empty(0, np.uint64)
        self.accepted_at = self.deadline = np.empty(0, np.float64)
        self.kind = self.status = np.empty(0, np.uint8)
        self._grow(1024)
        self.token_pool: Pool[Any] = Pool(token_dtype, token_width, self._live_tokens, self._tokens_moved)
        self.held_pool: Pool[np.uint32] = Pool(np.uint32, 1, self._live_held, self._held_moved)
        self._moving = np.empty(0, np.int64)

    @property
    def num_runs(self) -> int:
        return self._capacity - self._num_free

    def allocate(self, num_runs: int, kind: int) -> IntArray:
        """New runs, WAITING, without tokens and not held."""
        if num_runs > self._num_free:
            self._grow(max(2 * self._capacity, self._capacity + num_runs))
        self._num_free -= num_runs
        runs = self._free[self._num_free : self._num_free + num_runs].copy()
        self.status[runs] = Status.WAITING
        self.kind[runs] = kind
        self.count[runs] = 0
        self.done[runs] = 0
        self.held[runs] = NOT_HELD
        self.next[runs] = NO_RUN
        return runs

    def append(self, rows: IntArray, runs: IntArray) -> None:
        """Put one run at the end of each session's chain. rows: (n,) all different."""
        sessions = self._sessions
        last = sessions.last_run[rows]
        chained = last != NO_RUN
        self.next[last[chained]] = runs[chained]
        sessions.first_run[rows[~chained]] = runs[~chained]
        sessions.last_run[rows] = runs
        idle = sessions.next_run[rows] == NO_RUN
        sessions.next_run[rows[idle]] = runs[idle]
        sessions.num_unfinished[rows] += 1

    def finish(self, rows: IntArray, runs: IntArray) -> None:
        """The first unfinished run of each session is done; from now on its answer is held. rows: all different."""
        sessions = self._sessions
        self.status[runs] = Status.HELD
        sessions.next_run[rows] = self.next[runs]
        sessions.last_held[rows] = runs
        sessions.num_unfinished[rows] -= 1
        sessions.num_held[rows] += 1
        sessions.held_words[rows] += self.held_words[runs]
        self.token_pool.release(int(self.count[runs].sum()))

    def insert_held(self, row: int, run: int) -> None:
        """Put a finished run behind the session's held answers, before its unfinished runs."""
        sessions = self._sessions
        self.status[run] = Status.HELD
        self._link(row, int(sessions.last_held[row]), run)
        self._link(row, run, int(sessions.next_run[row]))
        sessions.last_held[row] = run
        sessions.num_held[row] += 1
        sessions.held_words[row] += self.held_words[run]

    def release_beyond(self, rows: IntArray, max_held: int, max_words: int) -> None:
        """Let go of the oldest held answers of sessions that hold more than they may. rows: all different."""
        sessions = self._sessions
        while True:
            over = (sessions.num_held[rows] > max_held) | (sessions.held_words[rows] > max_words)
            if not np.count_nonzero(over):
                return
            rows = rows[over]
            self._release_oldest(rows)

    def acknowledge(self, rows: IntArray, positions: IntArray) -> None:
        """Let go of held answers that end at or before the positions. rows: all different."""
        while True:
            holds = self._sessions.num_held[rows] > 0
            if np.count_nonzero(holds) < len(rows):
                rows, positions = rows[holds], positions[holds]
            if not len(rows):
                return
            oldest = self._sessions.first_run[rows]
            known = self.start[oldest] + self.count[oldest] <= positions
            if np.count_nonzero(known) < len(rows):
                rows, positions = rows[known], positions[known]
            self._release_oldest(rows)

    def forget(self, row: int) -> None:
        """Let go of all held answers of a session."""
        rows = np.array([row], np.int64)
        while self._sessions.num_held[row]:
            self._release_oldest(rows)

    def _release_oldest(self, rows: IntArray) -> None:
        sessions = self._sessions
        runs = sessions.first_run[rows]
        following = self.next[runs]
        num_held = sessions.num_held[rows] - 1
        sessions.first_run[rows] = following
        sessions.num_held[rows] = num_held
        sessions.held_words[rows] -= self.held_words[runs]
        sessions.last_held[rows[num_held == 0]] = NO_RUN
        sessions.last_run[rows[following == NO_RUN]] = NO_RUN
        self._discard(runs)

    def chain(self, row: int) -> Iterator[int]:
        """All runs of a session, oldest first."""
        return self._from(int(self._sessions.first_run[row]))

    def unfinished(self, row: int) -> Iterator[int]:
        """The unfinished runs of a session, in order."""
        return self._from(int(self._sessions.next_run[row]))

    def _from(self, run: int) -> Iterator[int]:
        while run != NO_RUN:
            following = int(self.next[run])
            yield run
            run = following

    def remove(self, row: int, removed: Collection[int]) -> None:
        """Take unfinished runs out of a session's chain. The caller has answered them."""
        kept = [run for run in self.unfinished(row) if run not in removed]
        self._sessions.next_run[row] = kept[0] if kept else NO_RUN
        self._sessions.num_unfinished[row] = len(kept)
        last = int(self._sessions.last_held[row])
        for run in kept:
            self._link(row, last, run)
            last = run
        self._link(row, last, NO_RUN)
        runs = np.fromiter(removed, np.int64, len(removed))
        self.token_pool.release(int(self.count[runs].sum()))
        self._discard(runs)

    def remove_first(self, row: int) -> None:
        """Take the first unfinished run, which has no tokens here, out of a session's chain."""
        sessions = self._sessions
        run = int(sessions.next_run[row])
        following = int(self.next[run])
        sessions.next_run[row] = following
        sessions.num_unfinished[row] -= 1
        self._link(row, int(sessions.last_held[row]), following)
        self._discard(np.array([run], np.int64))

    def _link(self, row: int, run: int, following: int) -> None:
        """Let one run follow another in a session's chain; NO_RUN stands for its ends."""
        if run == NO_RUN:
            self._sessions.first_run[row] = following
        else:
            self.next[run] = following
        if following == NO_RUN:
            self._sessions.last_run[row] = run

    def hold(self, runs: IntArray, words: IntArray) -> NDArray[np.uint32]:
        """Make room for the answers of runs, one after the other; returns the words of all of them.

        words: (n,) of each run's whole answer, at least 1.
        """
        ends = words.cumsum()
        num_words = int(ends[-1])
        offset = self.held_pool.allocate(num_words)
        self.held[runs] = offset + ends - words
        self.held_words[runs] = words
        return self.held_pool.rows[offset : offset + num_words, 0]

    def held_answer(self, run: int) -> NDArray[np.uint32]:
        """The words of a held answer; none where it is not held."""
        offset = max(0, int(self.held[run]))
        return self.held_pool.rows[offset : offset + int(self.held_words[run]), 0]

    def _discard(self, runs: IntArray) -> None:
        self.held_pool.release(int(self.held_words[runs].sum()))
        self.held_words[runs] = 0
        self.status[runs] = Status.FREE
        self._free[self._num_free : self._num_free + len(runs)] = runs
        self._num_free += len(runs)

    def _grow(self, capacity: int) -> None:
        for name, dtype in self._COLUMNS:
            column: NDArray[Any] = np.zeros(capacity, dtype)
            column[: self._capacity] = getattr(self, name)
            setattr(self, name, column)
        free = np.empty(capacity, np.int64)
        free[: self._num_free] = self._free[: self._num_free]
        added = capacity - self._capacity
        free[self._num_free : self._num_free + added] = np.arange(capacity - 1, self._capacity - 1, -1)
        self._free = free
        self._num_free += added
        self._capacity = capacity

    def _live_tokens(self) -> tuple[IntArray, IntArray]:
        unfinished = (self.status == Status.WAITING) | (self.status == Status.STARTED)
        self._moving = np.flatnonzero(unfinished & (self.count > 0))
        return self.tokens[self._moving], self.count[self._moving]

    def _tokens_moved(self, offsets: IntArray) -> None:
        self.tokens[self._moving] = offsets

    def _live_held(self) -> tuple[IntArray, IntArray]:
        self._moving = np.flatnonzero(self.held_words > 0)
        return self.held[self._moving], self.held_words[self._moving]

    def _held_moved(self, offsets: IntArray) -> None:
        self.held[self._moving] = offsets
