"""Commands of unary calls: each waits for the one event, or the slices, that answer it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np

from cellserve_service.errors import Refusal
from cellserve_service.front import Front
from cellserve_service.messages import (
    Answers,
    CancelRuns,
    Command,
    Draining,
    Event,
    Failures,
    Generated,
    Opened,
    SetStreamPaused,
)
from cellserve_service.statistics import FrontStatistics

Answer = Event | Refusal


# A token and its log-probability, as they wait.
GENERATED_TOKEN_BYTES = 8


class UnaryCalls:
    """A stream to which the commands of unary calls belong. It holds no session.

    When more than `max_unsent_bytes` of generated tokens wait for their reader, the stream's generates rest.
    """

    def __init__(
        self,
        front: Front,
        statistics: FrontStatistics,
        *,
        max_unsent_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._front = front
        self._statistics = statistics
        self._max_unsent_bytes = max_unsent_bytes
        self._clock = clock
        self._unsent_bytes = 0
        self._rests = False
        self._last_request = 0
        self._waiting: dict[int, asyncio.Queue[Answer]] = {}
        self.stream = front.register(self)

    def receive(self, event: Event) -> None:
        """Hand an event to the calls that it answers."""
        if isinstance(event, Draining):
            return  # the calls that come will be refused; those that are under way are finished
        if isinstance(event, Failures):
            for request, refusal in zip(event.requests.tolist(), event.refusals, strict=True):
                self._give(request, refusal)
        elif isinstance(event, Answers):
            # Several calls may have been answered by one tick; each takes its own rows.
            durations = self._clock() - event.accepted_at[event.remaining == 0]
            self._statistics.step_durations[event.model].observe(durations)
            for row, request in enumerate(event.requests.tolist()):
                self._give(request, event.rows(row, row + 1))
        elif isinstance(event, Opened):
            self._give(int(event.requests[0]), event)
        else:
            request = getattr(event, "request", None)
            self._give(int(event.requests[0]) if request is None else request, event)  # type: ignore[union-attr]

    def receive_row(self, answers: Answers, row: int, frame: bytes) -> None:
        """Hand one row to its call."""
        self.receive(answers.rows(row, row + 1))

    async def ask(self, command: Callable[[int], Command]) -> Event:
        """Post a command under a request number and wait for its one answer. Raises Refusal."""
        return (await self.ask_all(command))[0]

    async def ask_all(self, command: Callable[[int], Command]) -> list[Event]:
        """Post a command and wait for all events that answer it. Raises Refusal."""
        async with aclosing(self.answers(command)) as answers:
            return [event async for event in answers]

    async def answers(self, command: Callable[[int], Command]) -> AsyncGenerator[Event, None]:
        """The events that answer a command, up to the last. Raises Refusal.

        If the caller goes away before, what has not begun is withdrawn.
        """
        self._last_request += 1
        request = self._last_request
        answers = self._waiting[request] = asyncio.Queue()
        self._front.post(command(request))
        finished = False
        try:
            while not finished:
                answer = await answers.get()
                finished = isinstance(answer, Refusal) or _is_last(answer)
                if isinstance(answer, Refusal):
                    raise answer
                yield answer
                if isinstance(answer, Generated):
                    self._count_unsent(-len(answer.tokens))
        finally:
            del self._waiting[request]
            if not finished:
                self._front.post(CancelRuns(self.stream, np.array([request], np.uint64)))

    def fail_all(self, refusal: Refusal) -> None:
        """Answer every waiting call with a refusal."""
        for request in list(self._waiting):
            self._give(request, refusal)

    def close(self) -> None:
        """No more calls come."""
        self._front.forget(self.stream)

    def _give(self, request: int, answer: Answer) -> None:
        waiting = self._waiting.get(request)
        if waiting is not None:
            waiting.put_nowait(answer)
            if isinstance(answer, Generated):
                self._count_unsent(len(answer.tokens))

    def _count_unsent(self, num_tokens: int) -> None:
        self._unsent_bytes += num_tokens * GENERATED_TOKEN_BYTES
        if not self._rests and self._unsent_bytes > self._max_unsent_bytes:
            self._rests = True
            self._front.post(SetStreamPaused(self.stream, paused=True))
        elif self._rests and 2 * self._unsent_bytes <= self._max_unsent_bytes:
            self._rests = False
            self._front.post(SetStreamPaused(self.stream, paused=False))


def _is_last(event: Event) -> bool:
    if isinstance(event, Answers):
        return not event.remaining.any()
    if isinstance(event, Generated):
        return event.finished
    return True
