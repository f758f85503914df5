"""What concerns many sessions is done in turns, and the ticks go on between."""

import asyncio

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.engine import MAX_TURN_TARGETS, Engine
from cellserve_service.engine_loop import EngineLoop
from cellserve_service.idempotency import RequestMemory
from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import NO_OUTPUTS
from cellserve_service.statistics import Statistics
from tests.support.steppers import FakeStepper

STREAM = 5
NUM_SESSIONS = 10 * MAX_TURN_TARGETS + 7
TIMEOUT = 60.0


class _Engine:
    """An engine with many sessions on its loop, and a clock that stands still unless it is set."""

    def __init__(self) -> None:
        self.now = 100.0
        self.deliveries: list[list[messages.Event]] = []
        limits = EngineLimits(max_sessions=NUM_SESSIONS, max_slice_tokens=1, idle_timeout_seconds=TIMEOUT)
        self.engine = Engine([FakeStepper()], limits, Statistics())
        self.loop = EngineLoop(
            self.engine,
            memory=RequestMemory(1.0),
            deliver=self.deliveries.append,
            failed=self._failed,
            clock=lambda: self.now,
        )
        self.post(messages.StartStream(STREAM))
        requests = np.arange(NUM_SESSIONS, dtype=np.uint64)
        self.post(
            messages.OpenSessions(
                STREAM,
                requests,
                "fake",
                None,
                OpenMode.OPEN_MODE_CREATE,
                Durability.DURABILITY_UNSPECIFIED,
                None,
                all_or_none=False,
                attach=True,
            )
        )

    def _failed(self, error: BaseException) -> None:
        raise error

    def post(self, command: messages.Command) -> None:
        self.loop.post(command)

    @property
    def handles(self) -> messages.U64Array:
        [[opened]] = self.deliveries[:1]
        assert isinstance(opened, messages.Opened)
        return opened.handles

    def run(self, handle: int, num_tokens: int) -> None:
        self.post(
            messages.SubmitRuns(
                streams=np.array([STREAM]),
                requests=np.array([10**6], np.uint64),
                handles=np.array([handle], np.uint64),
                session_ids=None,
                counts=np.array([num_tokens]),
                tokens=np.ones(num_tokens, np.uint32),
                vectors=None,
                positions=None,
                timeouts_seconds=None,
                acknowledged=None,
                outputs=NO_OUTPUTS,
            )
        )

    async def turns(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)


@pytest.mark.parametrize("kind", [messages.CloseSessions, messages.ResetSessions, messages.DetachSessions])
async def test_a_command_for_many_sessions_is_done_for_each_of_them_and_lets_ticks_on_between(
    kind: type[messages.CloseSessions | messages.ResetSessions | messages.DetachSessions],
) -> None:
    engine = _Engine()
    await engine.turns(2)
    handles = engine.handles
    requests = np.arange(NUM_SESSIONS - 1, dtype=np.uint64)
    engine.run(int(handles[-1]), 4)
    engine.post(kind(messages.SessionTarget(STREAM, requests, handles[:-1])))
    engine.run(int(handles[-1]), 1)  # behind the command, whose first part comes before it as the last does
    await engine.turns(60)
    engine.loop.stop()
    done: list[int] = []
    num_done_before: list[int] = []
    for event in (event for events in engine.deliveries[1:] for event in events):
        if isinstance(event, messages.Done):
            done += event.requests.tolist()
        elif isinstance(event, messages.Answers):
            num_done_before.append(len(done))
        else:
            assert isinstance(event, messages.Failures)
            # A second run needs a position while the first is unanswered; it is answered by then.
            raise AssertionError(event)
    assert done == requests.tolist()
    first, second = num_done_before
    assert MAX_TURN_TARGETS <= first < 6 * MAX_TURN_TARGETS
    assert second == len(done)


async def test_many_sessions_that_expire_at_once_leave_a_few_at_a_time() -> None:
    engine = _Engine()
    await engine.turns(2)
    engine.now += TIMEOUT + 0.5
    largest, num_left = 0, NUM_SESSIONS
    more = True
    while more:
        more = engine.engine.sweep(engine.now)
        left = len(engine.engine.core.sessions)
        largest, num_left = max(largest, num_left - left), left
    engine.loop.stop()
    assert num_left == 0
    assert largest == MAX_TURN_TARGETS
    told = [event for event in engine.engine.take_events() if isinstance(event, messages.SessionEnded)]
    assert sorted(handle for event in told for handle in event.handles.tolist()) == sorted(engine.handles.tolist())
