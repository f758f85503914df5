"""Slots change hands without a state ever being seen by, or lost to, another session."""

import numpy as np
import pytest

from cellserve_service.sessions import SessionTable, Stage
from cellserve_service.slots import SlotMap
from cellserve_service.stepping import FloatArray, IntArray
from tests.support.steppers import FakeStepper


class _Slots:
    """Sessions a, b, ... on a slab of few slots."""

    def __init__(self, num_slots: int, num_sessions: int) -> None:
        self.sessions = SessionTable(num_sessions)
        self.stepper = FakeStepper(num_slots=num_slots)
        self.map = SlotMap(self.sessions, self.stepper, num_slots)
        self.rows = self.sessions.create("abcdef"[:num_sessions], 0, 7, 0.0)

    def tick(self, *rows: int, now: float) -> None:
        """Bring sessions to the device, and let each of them count one up."""
        self.begin(*rows)
        slots = self.sessions.slot[list(rows)]
        self.stepper.slab[slots] += 1
        self.end(*rows, now=now)

    def begin(self, *rows: int) -> None:
        self.sessions.stage[list(rows)] = Stage.IN_TICK
        self.map.make_resident(np.array(rows, np.int64))

    def end(self, *rows: int, now: float) -> None:
        self.sessions.stage[list(rows)] = Stage.IDLE
        self.sessions.last_used[list(rows)] = now

    def state(self, row: int) -> float:
        state = self.map.state(row)
        assert (state == state.flat[0]).all()
        return float(state.flat[0])

    def resident(self) -> IntArray:
        return np.flatnonzero(self.sessions.slot)


def test_a_session_that_never_ran_has_the_zero_state_and_no_slot() -> None:
    slots = _Slots(1, 1)
    assert slots.state(0) == 0
    assert slots.map.num_resident == 0


def test_a_slot_that_held_another_session_begins_at_zero() -> None:
    slots = _Slots(1, 2)
    slots.tick(0, now=1.0)
    slots.map.release(0)
    slots.tick(1, now=2.0)
    assert slots.state(1) == 1


def test_the_sessions_used_longest_ago_are_parked_and_come_back_as_they_were() -> None:
    slots = _Slots(2, 3)
    slots.tick(0, now=1.0)
    slots.tick(0, 1, now=2.0)
    slots.tick(1, now=3.0)
    slots.tick(2, now=4.0)
    assert slots.resident().tolist() == [1, 2]
    assert [slots.state(row) for row in range(3)] == [2, 2, 1]
    slots.tick(0, now=5.0)
    assert slots.resident().tolist() == [0, 2]
    assert [slots.state(row) for row in range(3)] == [3, 2, 1]
    assert (slots.map.num_parked, slots.map.num_unparked) == (2, 1)


def test_sessions_in_ticks_are_not_parked_however_long_ago_they_were_used() -> None:
    slots = _Slots(2, 3)
    slots.begin(0)
    slots.tick(1, now=9.0)
    slots.begin(2)
    assert slots.resident().tolist() == [0, 2]


def test_a_whole_batch_changes_places_with_what_is_parked() -> None:
    slots = _Slots(3, 6)
    for now, rows in enumerate([(0, 1, 2), (3, 4, 5), (2, 1, 0), (5, 0, 3), (1, 2, 4)]):
        slots.tick(*rows, now=now)
    assert [slots.state(row) for row in range(6)] == [3, 3, 3, 2, 2, 2]


def test_a_given_state_comes_to_the_device_with_the_next_run() -> None:
    slots = _Slots(1, 2)
    slots.tick(0, now=1.0)
    slots.map.replace_state(0, np.full_like(slots.map.state(0), 40))
    assert slots.map.num_resident == 0
    assert slots.state(0) == 40
    slots.tick(1, now=2.0)
    slots.tick(0, now=3.0)
    assert slots.state(0) == 41


def test_a_state_replaced_by_zeros_is_gone_from_slab_and_host() -> None:
    slots = _Slots(1, 2)
    slots.tick(0, now=1.0)
    slots.map.replace_state(0, None)
    slots.tick(1, now=2.0)
    slots.tick(0, now=3.0)
    assert slots.state(0) == 1


@pytest.mark.parametrize("parked", [False, True])
def test_a_state_that_was_read_is_a_copy(parked: bool) -> None:
    slots = _Slots(1, 2)
    slots.tick(0, now=1.0)
    if parked:
        slots.tick(1, now=2.0)
    state: FloatArray = slots.map.state(0)
    state += 100
    assert slots.state(0) == 1
