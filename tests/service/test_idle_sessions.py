"""Sessions that are idle for too long are found without looking through all of them, each of them and no other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve_service.idle_queue import IdleQueue
from cellserve_service.sessions import SessionTable
from cellserve_service.stepping import IntArray
from tests.service.profiles import QUICK

CAPACITY = 6
TIMEOUT = 10.0


class _CountingQueue(IdleQueue):
    """Counts the rows that are looked at."""

    num_taken = 0

    def take(self, before: float, most: int) -> IntArray:
        rows = super().take(before, most)
        self.num_taken += len(rows)
        return rows


class _Table(SessionTable):
    """A table whose sessions are ended as the engine does it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.now = 0.0
        self._numbers = 0

    def open(self, number: int) -> None:
        number = min(number, self.num_free)
        self._numbers += number
        self.create([f"s{self._numbers - place}" for place in range(number)], 0, 7, self.now)

    def end(self, row: int) -> None:
        self.forget_id(row)
        self.free(row)

    def scan(self) -> set[int]:
        """What is idle for too long, found by looking at every row."""
        idle = self.is_open & (self.num_unfinished == 0) & (self.last_used < self.now - TIMEOUT)
        return set(np.flatnonzero(idle).tolist())

    def sweep(self, most: int) -> None:
        """End what is idle for too long, a few at a time."""
        expected, found, more = self.scan(), [], True
        while more:
            rows, more = self.take_idle(self.now - TIMEOUT, most)
            assert len(rows) <= most
            found += rows.tolist()
            for row in rows.tolist():
                self.end(row)
        assert sorted(found) == sorted(expected)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, CAPACITY)),
        st.tuples(st.just("use"), st.integers(0, CAPACITY - 1)),
        st.tuples(st.just("begin"), st.integers(0, CAPACITY - 1)),
        st.tuples(st.just("finish"), st.integers(0, CAPACITY - 1)),
        st.tuples(st.just("end"), st.integers(0, CAPACITY - 1)),
        st.tuples(st.just("pass"), st.sampled_from([0.25, 0.5, 1.0, 3.0, 9.75, 10.0, 10.5, 30.0])),
        st.tuples(st.just("sweep"), st.integers(1, 4)),
    ),
    max_size=60,
)


@QUICK
@given(STEPS)
def test_a_sweep_finds_what_a_look_at_every_row_finds(steps: list[tuple[str, float]]) -> None:
    table = _Table(CAPACITY)
    for name, number in steps:
        row = int(number)
        match name:
            case "open":
                table.open(row)
            case "use" if table.is_open[row]:
                table.last_used[row] = table.now
            case "begin" if table.is_open[row]:
                table.num_unfinished[row] = 1
            case "finish":  # without a word of when: what is withdrawn does not count as use
                table.num_unfinished[row] = 0
            case "end" if table.is_open[row]:
                table.num_unfinished[row] = 0
                table.end(row)
            case "pass":
                table.now += number
            case "sweep":
                table.sweep(row)
    table.num_unfinished[:] = 0
    table.now += 2 * TIMEOUT
    table.sweep(1)
    assert len(table) == 0


@pytest.mark.parametrize("steps_between", [1, 3])
def test_a_session_in_use_is_looked_at_about_once_in_an_idle_timeout(steps_between: int) -> None:
    table = _Table(1000)
    table._idle_queue = queue = _CountingQueue(1000)
    table.open(1000)
    for _ in range(100):
        table.now += 1.0
        table.last_used[np.arange(0, 1000, steps_between)] = table.now
        table.sweep(64)
    # In 100 seconds there are 10 timeouts; a look that comes within the second of the last use comes again.
    assert queue.num_taken <= 1000 * (100 / TIMEOUT + 2)


def test_rows_that_come_and_go_do_not_fill_the_queue() -> None:
    table = _Table(4)
    for _ in range(5000):
        table.open(4)
        for row in range(4):
            table.end(row)
        table.now += 0.001
    assert sum(map(len, table._idle_queue._buckets.values())) <= 4
