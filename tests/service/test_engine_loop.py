"""The engine's turns on the event loop."""

import asyncio
import itertools

import numpy as np

from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.engine import Engine
from cellserve_service.engine_loop import GATHERING_TURNS, LONE_GATHERING_TURNS, LONE_TURNS, EngineLoop
from cellserve_service.idempotency import RequestMemory
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import Event
from cellserve_service.outputs import NO_OUTPUTS
from cellserve_service.statistics import Statistics
from tests.support.steppers import FakeStepper


class _Owner:
    """An engine loop, and what it has delivered."""

    def __init__(self) -> None:
        self.stepper = FakeStepper()
        self.events: list[Event] = []
        self.deliveries: asyncio.Queue[int] = asyncio.Queue()
        self.failures: list[BaseException] = []
        self.num_clock_calls = 0
        self.time_passes = True
        limits = EngineLimits(max_sessions=8, max_slice_tokens=2)
        engine = Engine([self.stepper], limits, Statistics())
        self.loop = EngineLoop(
            engine,
            memory=RequestMemory(60.0),
            deliver=self._deliver,
            failed=self.failures.append,
            clock=self._clock,
        )

    def open(self, session_id: str = "a") -> None:
        requests = np.array([1], np.uint64)
        self.loop.post(
            messages.OpenSessions(
                5,
                requests,
                "fake",
                [session_id],
                OpenMode.OPEN_MODE_UNSPECIFIED,
                Durability.DURABILITY_UNSPECIFIED,
                None,
                attach=False,
            )
        )

    def step(self, request: int, num_tokens: int, session_id: str = "a") -> None:
        self.loop.post(
            messages.SubmitRuns(
                streams=np.array([5]),
                requests=np.array([request], np.uint64),
                handles=None,
                session_ids=[session_id],
                counts=np.array([num_tokens]),
                tokens=np.ones(num_tokens, np.uint32),
                vectors=None,
                positions=None,
                timeouts_seconds=None,
                acknowledged=None,
                outputs=NO_OUTPUTS,
            )
        )

    def _clock(self) -> float:
        self.num_clock_calls += 1
        return float(self.num_clock_calls) if self.time_passes else 0.0

    def _deliver(self, events: list[Event]) -> None:
        assert events
        self.events += events
        self.deliveries.put_nowait(len(events))


async def test_commands_are_taken_in_order_and_all_that_they_bring_is_delivered_together() -> None:
    owner = _Owner()
    owner.open()
    owner.step(2, 1)
    assert await owner.deliveries.get() == 2
    assert [type(event) for event in owner.events] == [messages.Opened, messages.Answers]
    owner.loop.stop()


async def test_a_long_run_goes_on_from_turn_to_turn_and_lets_others_on_between() -> None:
    owner = _Owner()
    owner.open()
    await owner.deliveries.get()
    owner.step(2, 10)
    num_ticks_seen = []
    while owner.deliveries.empty():
        num_ticks_seen.append(len(owner.stepper.batches))
        await asyncio.sleep(0)
    assert set(num_ticks_seen) >= {1, 2, 3, 4}
    assert len(owner.stepper.batches) == 5
    owner.loop.stop()


async def test_a_part_of_a_long_run_waits_for_nothing_behind_single_tokens() -> None:
    owner = _Owner()
    owner.open("a")
    owner.open("b")
    await owner.deliveries.get()
    owner.step(2, 10, "a")
    owner.step(3, 1, "b")
    begun_at: list[int] = []  # the turn of the event loop of each tick
    for turn in range(200):
        begun_at += [turn] * (len(owner.stepper.batches) - len(begun_at))
        await asyncio.sleep(0)
    assert [batch.tolist() for batch in owner.stepper.batches] == [[1], [2], [2], [2], [2], [2]]
    waits = np.diff(begun_at).tolist()
    assert waits[0] == 1
    assert min(waits[1:]) > 1
    owner.loop.stop()


async def _many_turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_fault_ends_the_engine_and_is_told_once() -> None:
    owner = _Owner()
    owner.open()
    await owner.deliveries.get()
    owner.stepper.failure = RuntimeError("the device is lost")
    owner.step(2, 10)
    await _many_turns()
    owner.step(3, 1)
    await _many_turns()
    assert owner.failures == [owner.stepper.failure]
    assert len(owner.stepper.batches) == 1


async def test_a_stopped_engine_takes_no_more_turns() -> None:
    owner = _Owner()
    owner.open()
    owner.loop.stop()
    await _many_turns()
    assert not owner.events


async def test_an_idle_engine_asks_for_no_turns() -> None:
    owner = _Owner()
    owner.open()
    owner.step(2, 9)
    await _many_turns()
    num_calls = owner.num_clock_calls
    await _many_turns()
    assert owner.num_clock_calls == num_calls
    owner.loop.stop()


async def _turns_until_taken(owner: _Owner, *requests: int) -> int:
    """Turns of the event loop from frames, which come in one of them, to their answers."""
    left = list(requests)

    def take() -> None:
        while left:
            owner.step(left.pop(0), 1)

    for _ in requests:
        owner.loop.announce(take)
    number = 0
    while owner.deliveries.empty():
        number += 1
        await asyncio.sleep(0)
    owner.deliveries.get_nowait()
    return number


async def test_who_is_alone_waits_for_others_only_until_it_is_known_that_there_are_none() -> None:
    owner = _Owner()
    owner.open()
    await owner.deliveries.get()
    owner.time_passes = False  # so that each frame comes at once after a turn
    numbers = itertools.count(2)
    waits = [await _turns_until_taken(owner, next(numbers)) for _ in range(2 * LONE_TURNS)]
    assert min(waits[: LONE_TURNS - 1]) >= GATHERING_TURNS
    assert max(waits[LONE_TURNS:]) <= LONE_GATHERING_TURNS + 3
    # Two that come together are a sign of more.
    await _turns_until_taken(owner, next(numbers), next(numbers))
    assert await _turns_until_taken(owner, next(numbers)) >= GATHERING_TURNS
    owner.loop.stop()
