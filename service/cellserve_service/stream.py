"""The servicer of SessionService.Stream: frames in, frames out, each stream with its own reader and writer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

import grpc
import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.decoding import decode_frame
from cellserve_service.encoding import encode_events, event_bytes
from cellserve_service.errors import Refusal
from cellserve_service.front import Front
from cellserve_service.messages import (
    Acknowledge,
    Answers,
    CancelRuns,
    CloseSessions,
    DetachSessions,
    Done,
    Event,
    Failures,
    Opened,
    OpenSessions,
    ResetSessions,
    SetStreamPaused,
    SubmitRuns,
)
from cellserve_service.statistics import FrontStatistics
from cellserve_service.status import abort

StreamContext: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class StreamServicer:
    """Serves streams; each call of `serve` is one."""

    def __init__(
        self,
        front: Front,
        statistics: FrontStatistics,
        *,
        max_open_sessions: int,
        max_answer_bytes: int,
        max_unsent_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._front = front
        self._statistics = statistics
        self._max_open_sessions = max_open_sessions
        self._max_answer_bytes = max_answer_bytes
        self._max_unsent_bytes = max_unsent_bytes
        self._clock = clock
        self._calls: set[_StreamCall] = set()
        self._ending: Refusal | None = None

    async def serve(self, _requests: object, context: StreamContext) -> None:
        """One stream, from its first frame to its end."""
        if self._ending is not None:
            await abort(context, self._ending)
        call = _StreamCall(context, self._front, self._statistics, self._max_unsent_bytes, self._clock)
        self._calls.add(call)
        self._statistics.streams += 1
        reader = asyncio.create_task(call.read(self._max_open_sessions))
        writer = asyncio.create_task(call.write(self._max_answer_bytes))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
                await writer
            writer.result()
            if self._ending is not None:
                await abort(context, self._ending)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            call.close()
            self._calls.discard(call)
            self._statistics.streams -= 1

    def end_streams(self, refusal: Refusal) -> None:
        """Let every stream write what it has and end with a refusal."""
        self._ending = refusal
        for call in self._calls:
            call.finish()


class _StreamCall:
    """One stream while it lasts."""

    def __init__(
        self,
        context: StreamContext,
        front: Front,
        statistics: FrontStatistics,
        max_unsent_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._context = context
        self._front = front
        self._statistics = statistics
        self._max_unsent_bytes = max_unsent_bytes
        self._clock = clock
        self._events: list[Event] = []
        self._events_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._waits: asyncio.Future[None] | None = None  # of the writer, for something to write
        self._writable = asyncio.Event()
        self._writable.set()
        self._unsent_bytes = 0
        self._unanswered = 0  # requests
        self._read_all = False
        self._finishing = False
        self.stream = front.register(self)

    def receive(self, event: Event) -> None:
        """Queue an event for writing."""
        self._events.append(event)
        size = event_bytes(event)
        self._events_bytes += size
        self._unsent_bytes += size
        self._statistics.stream_unsent_bytes += size
        if self._unsent_bytes > self._max_unsent_bytes and self._writable.is_set():
            self._writable.clear()
            self._front.post(SetStreamPaused(self.stream, paused=True))
        self._wake_writer()

    def finish(self) -> None:
        """Write what there is, then end."""
        self._finishing = True
        self._wake_writer()

    async def read(self, max_open_sessions: int) -> None:
        """Read frames until the client has no more.

        Nothing is read while the client leaves its answers unread, or the engine what was read before.
        """
        while True:
            frame: object = await self._context.read()
            if not isinstance(frame, bytes):  # grpc.aio.EOF: the client has no more
                break
            for command in decode_frame(self.stream, frame, max_open_sessions):
                if isinstance(command, Failures):
                    self._unanswered += len(command.requests)
                    self._statistics.count_failures(command.refusals)
                    self.receive(command)
                    continue
                if not isinstance(command, CancelRuns | Acknowledge):
                    self._unanswered += _num_requests(command)
                self._front.post(command)
            if not self._writable.is_set():
                await self._writable.wait()
            if not self._front.flows.is_set():
                await self._front.flows.wait()
        self._read_all = True
        if not self._unanswered:
            self.finish()

    async def write(self, max_answer_bytes: int) -> None:
        """Write whatever became ready, until all requests of a finished reader are answered."""
        while True:
            if not self._events and not self._finishing:
                self._waits = self._loop.create_future()
                await self._waits
            events, self._events = self._events, []
            num_bytes, self._events_bytes = self._events_bytes, 0
            for frame in encode_events(events, num_bytes, max_answer_bytes):
                await self._context.write(frame)
            self._written(events, num_bytes)
            if self._finishing and not self._events:
                return

    def close(self) -> None:
        self._front.forget(self.stream)
        self._statistics.stream_unsent_bytes -= self._unsent_bytes

    def _wake_writer(self) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    def _written(self, events: list[Event], num_bytes: int) -> None:
        now = self._clock()
        for event in events:
            if isinstance(event, Answers):
                accepted_at = event.accepted_at
                if np.count_nonzero(event.remaining):
                    accepted_at = accepted_at[event.remaining == 0]
                self._unanswered -= len(accepted_at)
                self._statistics.step_durations[event.model].observe(now - accepted_at)
            elif isinstance(event, Failures | Opened | Done):
                self._unanswered -= len(event.requests)
        self._unsent_bytes -= num_bytes
        self._statistics.stream_unsent_bytes -= num_bytes
        if not self._writable.is_set() and 2 * self._unsent_bytes <= self._max_unsent_bytes:
            self._writable.set()
            self._front.post(SetStreamPaused(self.stream, paused=False))
        if self._read_all and not self._unanswered:
            self.finish()


def _num_requests(command: object) -> int:
    if isinstance(command, ResetSessions | CloseSessions | DetachSessions):
        return len(command.target.requests)
    assert isinstance(command, SubmitRuns | OpenSessions)
    return len(command.requests)


ENGINE_FAILED = Refusal(ErrorReason.ERROR_REASON_ENGINE_FAILED, "the engine failed; the server is ending")
STOPPING = Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is stopping")
