"""The servicer of SessionService.Stream: frames in, frames out, each stream with its own reader and writer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.decoding import decode_frame
from cellserve_service.encoding import encode_event
from cellserve_service.errors import Refusal
from cellserve_service.frames import Frame, FrameReader
from cellserve_service.front import Front
from cellserve_service.messages import (
    Acknowledge,
    Answers,
    CancelRuns,
    Done,
    Event,
    Failures,
    Opened,
    OpenSessions,
    SetStreamPaused,
    StreamCommand,
    SubmitRuns,
)
from cellserve_service.pools import stretches
from cellserve_service.statistics import FrontStatistics
from cellserve_service.status import abort

StreamContext: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

# A frame, how many requests it answers, and, where they are of runs, their model and when they were accepted.
_Unsent: TypeAlias = tuple[bytes, int, int, NDArray[np.float64] | float | None]


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
        self._calls: dict[int, _StreamCall] = {}  # by stream
        self._frames: list[Frame] = []  # read, and not decoded
        self._reader = FrameReader(max_open_sessions)
        self._ending: Refusal | None = None

    async def serve(self, _requests: object, context: StreamContext) -> None:
        """One stream, from its first frame to its end."""
        if self._ending is not None:
            await abort(context, self._ending)
        call = _StreamCall(
            context, self._front, self._statistics, self._max_answer_bytes, self._max_unsent_bytes, self._clock
        )
        self._calls[call.stream] = call
        self._statistics.streams += 1
        reader = asyncio.create_task(self._read(call, context))
        writer = asyncio.create_task(call.write())
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
            self._decode()
            call.close()
            del self._calls[call.stream]
            self._statistics.streams -= 1

    def end_streams(self, refusal: Refusal) -> None:
        """Let every stream write what it has and end with a refusal."""
        self._ending = refusal
        for call in self._calls.values():
            call.finish()

    async def _read(self, call: _StreamCall, context: StreamContext) -> None:
        """Read a stream's frames until the client has no more.

        Nothing is read while the client leaves its answers unread, or the engine what was read before.
        """
        front = self._front
        while True:
            frame: object = await context.read()
            if not isinstance(frame, bytes):  # grpc.aio.EOF: the client has no more
                break
            self._frames.append(Frame(call.stream, frame))
            front.announce(self._decode)
            if not call.writable.is_set():
                await call.writable.wait()
            if not front.flows.is_set():
                await front.flows.wait()
        self._decode()
        call.end_reading()

    def _decode(self) -> None:
        """Post the commands of all frames that were read."""
        frames, self._frames = self._frames, []
        for read in self._reader.read(frames):
            if isinstance(read, SubmitRuns):
                self._post(read)
                continue
            try:
                for command in decode_frame(read.stream, read.data, self._max_open_sessions):
                    self._post(command)
            except Exception as error:  # a fault of ours ends this stream, and no other
                self._calls[read.stream].fail(error)

    def _post(self, command: StreamCommand | Failures) -> None:
        if isinstance(command, Failures):
            call = self._calls[command.stream]
            call.num_unanswered += len(command.requests)
            self._statistics.count_failures(command.refusals)
            call.receive(command)
            return
        if isinstance(command, SubmitRuns):
            firsts, lengths = stretches(command.streams)
            for stream, number in zip(command.streams[firsts].tolist(), lengths.tolist(), strict=True):
                self._calls[stream].num_unanswered += number
        elif not isinstance(command, CancelRuns | Acknowledge):
            asked = command if isinstance(command, OpenSessions) else command.target
            self._calls[asked.stream].num_unanswered += len(asked.requests)
        self._front.post(command)


class _StreamCall:
    """One stream while it lasts."""

    def __init__(
        self,
        context: StreamContext,
        front: Front,
        statistics: FrontStatistics,
        max_answer_bytes: int,
        max_unsent_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.writable = asyncio.Event()  # clear while the client leaves its answers unread
        self.writable.set()
        self.num_unanswered = 0  # requests
        self._context = context
        self._front = front
        self._statistics = statistics
        self._max_answer_bytes = max_answer_bytes
        self._max_unsent_bytes = max_unsent_bytes
        self._clock = clock
        self._unsent: list[_Unsent] = []
        self._num_unsent_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._waits: asyncio.Future[None] | None = None  # of the writer, for something to write
        self._read_all = False
        self._finishing = False
        self._failure: Exception | None = None
        self.stream = front.register(self)

    def receive(self, event: Event) -> None:
        """Queue an event for writing."""
        for part, frame in encode_event(event, self._max_answer_bytes):
            if isinstance(part, Answers):
                accepted_at = part.accepted_at
                if np.count_nonzero(part.remaining):
                    accepted_at = accepted_at[part.remaining == 0]
                self._queue((frame, len(accepted_at), part.model, accepted_at))
            elif isinstance(part, Failures | Opened | Done):
                self._queue((frame, len(part.requests), 0, None))
            else:
                self._queue((frame, 0, 0, None))

    def receive_row(self, answers: Answers, row: int, frame: bytes) -> None:
        """Queue the frame of one row."""
        if answers.remaining[row]:
            self._queue((frame, 0, 0, None))
        else:
            self._queue((frame, 1, answers.model, answers.accepted_at[row]))

    def finish(self) -> None:
        """Write what there is, then end."""
        self._finishing = True
        self._wake_writer()

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._failure = error
        self._wake_writer()

    def end_reading(self) -> None:
        """No more requests come."""
        self._read_all = True
        if not self.num_unanswered:
            self.finish()

    async def write(self) -> None:
        """Write whatever became ready, until all requests of a finished reader are answered."""
        while True:
            if not self._unsent and not self._finishing:
                self._waits = self._loop.create_future()
                await self._waits
            if self._failure is not None:
                raise self._failure
            unsent, self._unsent = self._unsent, []
            for frame in self._joined(unsent):
                await self._context.write(frame)
            self._written(unsent)
            if self._finishing and not self._unsent:
                return

    def close(self) -> None:
        self._front.forget(self.stream)
        self._statistics.stream_unsent_bytes -= self._num_unsent_bytes

    def _queue(self, unsent: _Unsent) -> None:
        self._unsent.append(unsent)
        num_bytes = len(unsent[0])
        self._num_unsent_bytes += num_bytes
        self._statistics.stream_unsent_bytes += num_bytes
        if self._num_unsent_bytes > self._max_unsent_bytes and self.writable.is_set():
            self.writable.clear()
            self._front.post(SetStreamPaused(self.stream, paused=True))
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    def _joined(self, unsent: list[_Unsent]) -> Iterator[bytes]:
        """What waits, in as few frames as max_answer_bytes allows."""
        if len(unsent) == 1:
            yield unsent[0][0]
            return
        frames: list[bytes] = []
        size = 0
        for frame, *_ in unsent:
            if frames and size + len(frame) > self._max_answer_bytes:
                yield b"".join(frames)
                frames, size = [], 0
            frames.append(frame)
            size += len(frame)
        if frames:
            yield b"".join(frames)

    def _written(self, unsent: list[_Unsent]) -> None:
        now = self._clock()
        num_bytes = 0
        for frame, num_answered, model, accepted_at in unsent:
            num_bytes += len(frame)
            self.num_unanswered -= num_answered
            if isinstance(accepted_at, float):
                self._statistics.step_durations[model].observe_one(now - accepted_at)
            elif accepted_at is not None:
                self._statistics.step_durations[model].observe(now - accepted_at)
        self._num_unsent_bytes -= num_bytes
        self._statistics.stream_unsent_bytes -= num_bytes
        if not self.writable.is_set() and 2 * self._num_unsent_bytes <= self._max_unsent_bytes:
            self.writable.set()
            self._front.post(SetStreamPaused(self.stream, paused=False))
        if self._read_all and not self.num_unanswered:
            self.finish()


ENGINE_FAILED = Refusal(ErrorReason.ERROR_REASON_ENGINE_FAILED, "the engine failed; the server is ending")
STOPPING = Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is stopping")
