"""Drives the engine from the event loop: takes commands, runs one tick, gives out events, and lets the others on.

The engine has no thread of its own. Between a thread that computes and one that serves, Python's interpreter lock
changes hands a dozen times a tick, and a third of the throughput went with that. Here a tick holds the event loop for
as long as one batch takes; meanwhile gRPC's own threads go on, and clients work on the answers of the batch before.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from cellserve_service.collecting import settle_collector
from cellserve_service.engine import Engine
from cellserve_service.idempotency import RequestMemory
from cellserve_service.messages import Command, Event, SubmitGenerate, SubmitRuns
from cellserve_service.store_requests import StoreRequest

SWEEP_SECONDS = 1.0
# gRPC brings one call, and one frame of a stream, in some turns of the event loop. A batch that began with the first
# would hold up the next for as long as it takes, and they would be served one by one. So where more may be on its way
# a turn of the engine waits until so many turns of the loop have brought nothing, but not for longer than the last one
# took, or GATHERING_SECONDS. (Turns, not seconds: in a turn that writes answers, nothing can come.) More may be on its
# way behind a call, at once after a turn, and, where there is work left, behind a turn so long that much has come
# meanwhile; but the next tick waits for nothing where it will be of longer work in any case. Somebody who is alone
# would wait in vain: after LONE_TURNS of the engine that had one message each, fewer turns of the loop are enough,
# until they bring another.
GATHERING_TURNS = 32
LONE_GATHERING_TURNS = 4
LONE_TURNS = 8
GATHERING_SECONDS = 0.002
AT_ONCE_SECONDS = 0.0003
LONG_TURN_SECONDS = 0.0003

logger = logging.getLogger(__name__)


class EngineLoop:
    """Gives the engine its turns on the running event loop.

    `deliver` gets the events of a turn, `failed` the exception that ended the engine. A fault of the device or the
    engine ends it: what the slab held is not to be trusted.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        memory: RequestMemory,
        deliver: Callable[[list[Event]], None],
        failed: Callable[[BaseException], None],
        ask_store: Callable[[list[StoreRequest]], None] | None = None,
        checkpoint_interval_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._deliver = deliver
        self._failed = failed
        self._ask_store = ask_store
        self._checkpoint_interval_seconds = checkpoint_interval_seconds
        self._is_checkpointing = False
        self._is_sweeping = False
        self._clock = clock
        self._inbox: deque[Command] = deque()
        self._loop = asyncio.get_running_loop()
        self._has_turn = False
        self._gathers = False  # more may be on its way
        self._num_come = 0  # commands and frames
        self._num_taken = 0  # of them, by the last turn and those before it
        self._num_lone_turns = 0  # in a row that had one or none
        self._take: Callable[[], None] | None = None
        self._turn_seconds = 0.0  # of the last turn
        self._turn_ended_at = 0.0
        self._ended = False
        settle_collector()
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        if ask_store is not None:
            self._loop.call_later(checkpoint_interval_seconds, self._checkpoint)

    def post(self, command: Command) -> None:
        """Give the engine a command; it takes it in its next turn."""
        now = self._clock()
        if not self._memory.knows(command, now):
            self._inbox.append(command)
            self._come(now, _is_of_call(command))
        self._ask_for_turn()

    def announce(self, take: Callable[[], None]) -> None:
        """Call `take`, always the same, when the next turn begins: it posts what has come with it."""
        self._take = take
        self._come(self._clock(), False)
        self._ask_for_turn()

    def _come(self, now: float, is_call: bool) -> None:
        self._num_come += 1
        self._gathers = self._gathers or is_call or now - self._turn_ended_at < AT_ONCE_SECONDS

    def stop(self) -> None:
        """No more turns."""
        self._ended = True

    def _ask_for_turn(self) -> None:
        if not self._has_turn and not self._ended:
            self._has_turn = True
            seconds = max(GATHERING_SECONDS, self._turn_seconds)
            self._loop.call_soon(self._gather, 0, 0, self._clock() + seconds)

    def _gather(self, num_before: int, num_idle: int, until: float) -> None:
        """Take a turn when messages have ceased to come. num_before: how many had one turn of the loop ago."""
        number = self._num_come
        num_idle = num_idle + 1 if number == num_before else 0
        enough = GATHERING_TURNS if self._num_lone_turns < LONE_TURNS else LONE_GATHERING_TURNS
        if not self._gathers or self._engine.goes_on or num_idle >= enough or self._clock() >= until:
            self._take_turn()
        else:
            self._loop.call_soon(self._gather, number, num_idle, until)

    def _take_turn(self) -> None:
        if self._ended:
            return
        engine, clock = self._engine, self._clock
        begun_at = clock()
        try:
            self._num_lone_turns = 0 if self._num_come > self._num_taken + 1 else self._num_lone_turns + 1
            if self._take is not None:
                take, self._take = self._take, None
                take()
            # What was posted by that had come before, as it was announced.
            self._num_taken = self._num_come
            self._has_turn = self._gathers = False
            engine.handle_all(self._inbox, clock())
            tick = engine.begin_tick(clock())
            if tick is not None:
                engine.finish_tick(tick, engine.collect(tick), clock())
            if self._is_sweeping:
                self._is_sweeping = engine.sweep(clock())
            if self._is_checkpointing:
                self._is_checkpointing = engine.write_due(clock())
            self._turn_ended_at = clock()
            self._turn_seconds = self._turn_ended_at - begun_at
            events = self._memory.see(engine.take_events())
            requests = engine.take_store_requests()
        except BaseException as error:  # the process ends with it, whatever it is
            self._fail(error)
            return
        if requests and self._ask_store is not None:
            self._ask_store(requests)
        if events:
            self._deliver(events)
        if self._inbox or engine.has_work or self._is_checkpointing or self._is_sweeping:
            self._gathers = self._gathers or self._turn_seconds > LONG_TURN_SECONDS
            self._ask_for_turn()

    def _checkpoint(self) -> None:
        if self._ended:
            return
        self._engine.begin_checkpoint(self._clock())
        self._is_checkpointing = True
        self._loop.call_later(self._checkpoint_interval_seconds, self._checkpoint)
        self._ask_for_turn()

    def _sweep(self) -> None:
        if self._ended:
            return
        self._is_sweeping = True
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._ask_for_turn()

    def _fail(self, error: BaseException) -> None:
        self._ended = True
        logger.error("the engine failed", exc_info=error)
        self._failed(error)


def _is_of_call(command: Command) -> bool:
    """Whether a run or a generate comes by a call of its own."""
    return isinstance(command, SubmitGenerate) or (isinstance(command, SubmitRuns) and command.handles is None)
