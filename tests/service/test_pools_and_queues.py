"""The building blocks of the run tables: shared arrays, and the line of sessions that are ready."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve_service.pools import Pool, ragged_indices
from cellserve_service.queues import RowQueue
from cellserve_service.stepping import IntArray
from tests.service.profiles import QUICK


def test_ragged_indices_run_from_each_start() -> None:
    assert ragged_indices(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


class _Owner:
    """Keeps lists of numbers in a pool, and beside it."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = []
        self.offsets: list[int] = []
        self.pool: Pool[np.uint32] = Pool(np.uint32, 1, self._live, self._moved)
        self.pool.rows = self.pool.rows[:8]

    def put(self, numbers: list[int]) -> None:
        offset = self.pool.allocate(len(numbers))
        self.pool.rows[offset : offset + len(numbers), 0] = numbers
        self.lists.append(numbers)
        self.offsets.append(offset)

    def drop(self, place: int) -> None:
        del self.offsets[place]
        self.pool.release(len(self.lists.pop(place)))

    def check(self) -> None:
        for offset, numbers in zip(self.offsets, self.lists, strict=True):
            assert self.pool.rows[offset : offset + len(numbers), 0].tolist() == numbers
        assert self.pool.num_live == sum(map(len, self.lists))

    def _live(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        for first in range(0, len(self.lists), 2):
            places = np.arange(first, min(first + 2, len(self.lists)))
            counts = [len(self.lists[place]) for place in places.tolist()]
            yield places, np.array(self.offsets, np.int64)[places], np.array(counts, np.int64)

    def _moved(self, places: IntArray, offsets: IntArray) -> None:
        for place, offset in zip(places.tolist(), offsets.tolist(), strict=True):
            self.offsets[place] = offset


@QUICK
@given(st.lists(st.one_of(st.integers(0, 5), st.lists(st.integers(0, 99), max_size=7)), max_size=60))
def test_a_pool_keeps_what_is_live_whatever_comes_and_goes(steps: list[int | list[int]]) -> None:
    owner = _Owner()
    for step in steps:
        if isinstance(step, list):
            owner.put(step)
        elif owner.lists:
            owner.drop(step % len(owner.lists))
        owner.check()


def test_a_pool_in_steady_use_does_not_grow() -> None:
    owner = _Owner()
    for number in range(1000):
        owner.put([number])
        if len(owner.lists) > 3:
            owner.drop(0)
    assert len(owner.pool.rows) <= 32


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "push_front", "pop", "remove"]), st.integers(0, 5)), max_size=80
)


@QUICK
@given(STEPS)
def test_a_row_queue_is_a_line_that_rows_can_leave(steps: list[Step]) -> None:
    queue, line = RowQueue(6), deque[int]()
    for kind, number in steps:
        absent = [row for row in range(6) if row not in line][:number]
        match kind:
            case "push":
                queue.push(np.array(absent, np.int64))
                line.extend(absent)
            case "push_front":
                queue.push_front(np.array(absent, np.int64))
                line.extendleft(reversed(absent))
            case "remove" if line:
                row = line[number % len(line)]
                queue.remove(row)
                line.remove(row)
            case "pop":
                popped = queue.pop(number).tolist()
                assert len(popped) <= number
                assert popped == [line.popleft() for _ in popped]
        assert len(queue) == len(line)
    popped = []
    while len(queue):
        popped += queue.pop(2).tolist()
    assert popped == list(line)


@pytest.mark.parametrize("times", [5, 20])
def test_a_full_ring_closes_its_holes_and_keeps_the_order(times: int) -> None:
    queue = RowQueue(4)
    queue.push(np.array([2, 0]))
    for _ in range(times):
        queue.push(np.array([3, 1]))
        queue.remove(1)
        queue.remove(3)
    queue.push(np.array([1]))
    assert queue.pop(99).tolist() == [2, 0, 1]
