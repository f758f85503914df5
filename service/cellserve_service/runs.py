"""The run table of a model: unfinished runs and held answers as rows of arrays, chained by session.

A session's chain holds its held answers, oldest first, then its unfinished runs in the order in which they were
accepted. Resets, exports and the like that wait for earlier runs stand in the chain as operations; what a generate has
sampled stands in it as held answers, a slice each.
"""

from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from cellserve_service.pools import Pool, slices
from cellserve_service.requests import Requests
from cellserve_service.sessions import NO_RUN, SessionTable
from cellserve_service.stepping import IntArray
from cellserve_service.tables import Int32Array, Table


class Kind:
    """What an entry of a chain is. Plain numbers: numpy compares a column with an enum five times slower."""

    RUN: Final = 0
    GENERATE: Final = 1
    OPERATION: Final = 2


class Batch:
    """What the sessions of one tick have in common."""

    SINGLES: Final = 0  # their runs have one token left
    PARTS: Final = 1  # theirs have more, of which the tick takes a part
    GENERATES: Final = 2
    ALL: Final = (SINGLES, PARTS, GENERATES)


class Status:
    """How far a run is."""

    FREE: Final = 0
    WAITING: Final = 1
    STARTED: Final = 2
    HELD: Final = 3  # finished; its answer, or that there was one, is remembered


# As many answers between two compactions as a table of usual size has rows to look through.
_LEAST_HELD_WORDS: Final = 1 << 16

NOT_HELD = -1
NOT_ASKED = -1


class RunTable(Table):
    """Runs as arrays; an index into them is a run's number while it lives.

    Most runs at most times are held answers, one or a few for each session that ever ran: what only an unfinished run
    needs stands apart, in `requests`.
    """

    COLUMNS: ClassVar[tuple[tuple[str, type], ...]] = (
        ("start", np.int64),  # the position it is for
        ("digest", np.uint64),
        ("held", np.int64),  # offset in the pool of held answers, or NOT_HELD
        ("asked", np.int64),  # index into the requests, or NOT_ASKED
        ("count", np.int64),  # tokens
        ("next", np.int64),  # the session's next run
        ("session", np.int32),  # row of the session table
        ("spec", np.int32),  # index into the model's output specs
        ("held_words", np.int32),
        ("kind", np.uint8),
        ("status", np.uint8),
    )

    start: IntArray
    digest: NDArray[np.uint64]
    held: IntArray
    asked: IntArray
    count: IntArray
    next: IntArray
    session: Int32Array
    spec: Int32Array
    held_words: Int32Array
    kind: NDArray[np.uint8]
    status: NDArray[np.uint8]

    def __init__(self, sessions: SessionTable, token_dtype: type[Any], token_width: int) -> None:
        super().__init__(max(1024, sessions.capacity))
        self._sessions = sessions
        self.requests = Requests(token_dtype, token_width)
        self.held_pool: Pool[np.uint32] = Pool(np.uint32, 1, self._live_held, self._held_moved, _LEAST_HELD_WORDS)

    def allocate(self, num_runs: int, kind: int) -> IntArray:
        """New runs, WAITING, asked for by nobody and not held."""
        runs = self._take(num_runs)
        self.status[runs] = Status.WAITING
        self.kind[runs] = kind
        self.count[runs] = 0
        self.asked[runs] = NOT_ASKED
        self.held[runs] = NOT_HELD
        self.next[runs] = NO_RUN
        return runs

    def ask(
        self,
        runs: IntArray,
        streams: IntArray | int,
        numbers: NDArray[np.uint64] | int,
        accepted_at: float,
        deadline: NDArray[np.float64] | float,
    ) -> IntArray:
        """Note who asked for runs, and until when they must begin. Returns the requests."""
        requests = self.requests
        asked = requests.allocate(runs)
        self.asked[runs] = asked
        requests.stream[asked] = streams
        requests.number[asked] = numbers
        requests.accepted_at[asked] = accepted_at
        requests.deadline[asked] = deadline
        return asked

    def batch_of(self, run: int) -> int:
        """The batch that an unfinished run waits for; it is no operation."""
        if self.kind[run] == Kind.GENERATE:
            return Batch.GENERATES
        return Batch.PARTS if self.are_long(np.array([run]))[0] else Batch.SINGLES

    def are_long(self, runs: IntArray) -> NDArray[np.bool_]:
        """Which runs, unfinished ones of Kind.RUN, have more than one token left."""
        return self.requests.num_left(self.asked[runs]) > 1

    def request_of(self, run: int) -> tuple[int, int]:
        """Stream and number of the request for an unfinished run."""
        asked = self.asked[run]
        assert asked != NOT_ASKED
        return int(self.requests.stream[asked]), int(self.requests.number[asked])

    def append(self, rows: IntArray, runs: IntArray) -> None:
        """Put one run at the end of each session's chain. rows: (n,) all different."""
        sessions = self._sessions
        narrow = runs.astype(np.int32)
        last = sessions.last_run[rows].astype(np.int64)
        chained = last != NO_RUN
        self.next[last[chained]] = runs[chained]
        sessions.first_run[rows[~chained]] = narrow[~chained]
        sessions.last_run[rows] = narrow
        idle = sessions.next_run[rows] == NO_RUN
        sessions.next_run[rows[idle]] = runs[idle]
        sessions.num_unfinished[rows] = sessions.num_unfinished[rows] + 1

    def finish(self, rows: IntArray, runs: IntArray) -> None:
        """The first unfinished run of each session is done; from now on its answer is held. rows: all different."""
        sessions = self._sessions
        self.status[runs] = Status.HELD
        sessions.next_run[rows] = self.next[runs]
        sessions.last_held[rows] = runs.astype(np.int32)
        sessions.num_unfinished[rows] = sessions.num_unfinished[rows] - 1
        sessions.num_held[rows] = sessions.num_held[rows] + 1
        sessions.held_words[rows] = sessions.held_words[rows] + self.held_words[runs]
        self.requests.discard(self.asked[runs])
        self.asked[runs] = NOT_ASKED

    def insert_held(self, rows: IntArray, runs: IntArray) -> None:
        """Put a finished run behind each session's held answers, before its unfinished runs. rows: all different."""
        sessions, narrow = self._sessions, runs.astype(np.int32)
        self.status[runs] = Status.HELD
        last, following = sessions.last_held[rows].astype(np.int64), sessions.next_run[rows]
        is_first, is_last = last == NO_RUN, following == NO_RUN
        self.next[last[~is_first]] = runs[~is_first]
        sessions.first_run[rows[is_first]] = narrow[is_first]
        self.next[runs] = following
        sessions.last_run[rows[is_last]] = narrow[is_last]
        sessions.last_held[rows] = narrow
        sessions.num_held[rows] = sessions.num_held[rows] + 1
        sessions.held_words[rows] = sessions.held_words[rows] + self.held_words[runs]

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
            oldest = self._sessions.first_run[rows].astype(np.int64)
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
        runs = sessions.first_run[rows].astype(np.int64)
        following = self.next[runs]
        num_held = sessions.num_held[rows] - 1
        sessions.first_run[rows] = following.astype(np.int32)
        sessions.num_held[rows] = num_held
        sessions.held_words[rows] = sessions.held_words[rows] - self.held_words[runs]
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
        self._discard_unfinished(np.fromiter(removed, np.int64, len(removed)))

    def remove_first(self, row: int) -> None:
        """Take the first unfinished run out of a session's chain."""
        sessions = self._sessions
        run = int(sessions.next_run[row])
        following = int(self.next[run])
        sessions.next_run[row] = following
        sessions.num_unfinished[row] -= 1
        self._link(row, int(sessions.last_held[row]), following)
        self._discard_unfinished(np.array([run], np.int64))

    def _link(self, row: int, run: int, following: int) -> None:
        """Let one run follow another in a session's chain; NO_RUN stands for its ends."""
        if run == NO_RUN:
            self._sessions.first_run[row] = following
        else:
            self.next[run] = following
        if following == NO_RUN:
            self._sessions.last_run[row] = run

    def hold(self, runs: IntArray, words: IntArray | int) -> NDArray[np.uint32]:
        """Make room for the answers of runs, one after the other; returns the words of all of them.

        words: (n,) of each run's whole answer, at least 1; or of every one's.
        """
        if isinstance(words, int):
            num_words = words * len(runs)
            offset = self.held_pool.allocate(num_words)
            self.held[runs] = np.arange(offset, offset + num_words, words)
            self.held_words[runs] = words
        else:
            ends = words.cumsum()
            num_words = int(ends[-1])
            offset = self.held_pool.allocate(num_words)
            self.held[runs] = offset + ends - words
            self.held_words[runs] = words.astype(np.int32)
        return self.held_pool.rows[offset : offset + num_words, 0]

    def held_answer(self, run: int) -> NDArray[np.uint32]:
        """The words of a held answer; none where it is not held."""
        offset = max(0, int(self.held[run]))
        return self.held_pool.rows[offset : offset + int(self.held_words[run]), 0]

    def held_runs(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The held answers of sessions, one session behind the other, oldest first; and the place in rows of each."""
        places, runs = np.arange(len(rows)), self._sessions.first_run[rows].astype(np.int64)
        num_held = self._sessions.num_held[rows]
        found_places, found_runs = [places[:0]], [runs[:0]]
        while len(places := places[num_held > 0]):
            runs, num_held = runs[num_held > 0], num_held[num_held > 0] - 1
            found_places.append(places)
            found_runs.append(runs)
            runs = self.next[runs]
        all_places = np.concatenate(found_places)
        order = all_places.argsort(kind="stable")
        return np.concatenate(found_runs)[order], all_places[order]

    def _discard_unfinished(self, runs: IntArray) -> None:
        asked = self.asked[runs]
        self.requests.discard(asked[asked != NOT_ASKED])
        self._discard(runs)

    def _discard(self, runs: IntArray) -> None:
        self.held_pool.release(int(np.add.reduce(self.held_words[runs])))
        self.held_words[runs] = 0
        self.status[runs] = Status.FREE
        self._give_back(runs)

    def _live_held(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        for runs in slices(self.held_words):
            yield runs, self.held[runs], self.held_words[runs].astype(np.int64)

    def _held_moved(self, runs: IntArray, offsets: IntArray) -> None:
        self.held[runs] = offsets
