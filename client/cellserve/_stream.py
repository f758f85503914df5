"""One bidirectional stream to a server: writes what is asked for in frames, and reads always.

Whatever is asked for in one turn of the event loop, or while a frame is being written, travels in the next
frame. A connection does not outlive its stream; sessions do, and are attached to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from grpc import aio

from cellserve._backoff import Patience
from cellserve._conversation import Conversation
from cellserve._info import ServerLimits
from cellserve._unanswered import ProtocolError
from cellserve.columns import StreamResponse

if TYPE_CHECKING:
    StreamCall: TypeAlias = aio.StreamStreamCall[bytes, Any]

__all__ = ["Connection"]

_WATCH_SECONDS: Final = 1.0
# A server that is asked more than it can answer reads frame after frame, a batch each. So while it says nothing, what
# comes after so many frames is gathered for a while, and makes one frame.
_MAX_UNHEARD_FRAMES: Final = 2
_HEARING_SECONDS: Final = 0.005

_log: Final = logging.getLogger("cellserve")


class Connection:
    """A stream and the conversation on it.

    on_draining, on_end: called when the server says that it will stop, and when the stream has ended. has_heard:
    whether the server has ever said anything on it. patience: when it ends with what is asked, the stream is given up.
    """

    def __init__(
        self,
        call: StreamCall,
        limits: ServerLimits,
        on_draining: Callable[[], None],
        on_end: Callable[[Connection], None],
        patience: Patience,
    ) -> None:
        self._call = call
        self._on_draining = on_draining
        self._on_end = on_end
        self.has_heard = False
        self._loop = asyncio.get_running_loop()
        self._has_work = asyncio.Event()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self.conversation = Conversation(limits, self._has_work.set, self._sweep_at)
        self.is_open = True
        self._patience = patience
        self._oldest: tuple[int, int] | None = None  # as it was when the patience with it began
        self._waits_since = 0.0
        self._num_unheard = 0  # frames, since the server said something
        self._has_heard_again = asyncio.Event()
        self._watch_timer = self._loop.call_later(_WATCH_SECONDS, self._watch)
        self._writer = self._loop.create_task(self._write())
        self._reader = self._loop.create_task(self._read())

    async def finish(self, deadline: float) -> None:
        """Sends what waits, ends the stream in order, and waits until the deadline for the server to end it too."""
        self.is_open = False
        self._has_work.set()
        _, late = await asyncio.wait([self._reader], timeout=max(0.0, deadline - self._loop.time()))
        if late:
            self._call.cancel()
            await asyncio.wait([self._reader])

    async def _write(self) -> None:
        has_work = self._has_work
        take_frames = self.conversation.take_frames
        write = self._call.write
        try:
            while True:
                await has_work.wait()
                if self._num_unheard >= _MAX_UNHEARD_FRAMES:
                    await self._hear()
                has_work.clear()
                for frame in take_frames():
                    await write(frame)
                    self._num_unheard += 1
                if not self.is_open and not has_work.is_set():
                    await self._call.done_writing()
                    return
        except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError):
            return  # the stream has ended; the reader tells why
        except Exception:
            _log.exception("a frame could not be made; the stream is given up")
            self._call.cancel()

    async def _hear(self) -> None:
        """Waits for the server to say something, but not for long."""
        self._has_heard_again.clear()
        timer = self._loop.call_later(_HEARING_SECONDS, self._has_heard_again.set)
        try:
            await self._has_heard_again.wait()
        finally:
            timer.cancel()

    async def _read(self) -> None:
        code, details = "UNKNOWN", None
        is_draining = False
        try:
            while isinstance(response := await self._call.read(), StreamResponse):
                self.has_heard = True
                self._num_unheard = 0
                self._has_heard_again.set()
                self.conversation.receive(response)
                if not is_draining and self.conversation.is_draining:
                    is_draining = True
                    self._on_draining()
            code, details = "OK", "the server ended it"
        except aio.AioRpcError as error:
            code, details = error.code().name, error.details()
        except asyncio.CancelledError:
            # A call that is cancelled here says so by this exception, which is then none of this task.
            code, details = "CANCELLED", "this client ended it"
        except ProtocolError as error:
            code, details = "INTERNAL", str(error)
        except Exception:
            _log.exception("a frame of the server could not be read; the stream is given up")
            code, details = "INTERNAL", "a frame of the server could not be read"
        finally:
            self._end(code, details)

    def _end(self, code: str, details: str | None) -> None:
        self.is_open = False
        self._call.cancel()
        self._writer.cancel()
        self._watch_timer.cancel()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._on_end(self)
        self.conversation.end(code, details)

    def _watch(self) -> None:
        # A request or an answer may be lost on a connection that seems to live; on another stream it is asked again.
        oldest, now = self.conversation.oldest(), self._loop.time()
        if oldest is None or oldest != self._oldest:
            if self._oldest is not None:
                self._patience.renew()
            self._oldest, self._waits_since = oldest, now
        elif now - self._waits_since > self._patience.seconds:
            self._patience.wear_out()
            self._call.cancel()
            return
        self._watch_timer = self._loop.call_later(_WATCH_SECONDS, self._watch)

    def _sweep_at(self, deadline: float) -> None:
        # One timer for all requests, at the earliest deadline: most are answered long before.
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self.conversation.next_deadline = deadline
        self._sweep_timer = self._loop.call_at(deadline, self._sweep)

    def _sweep(self) -> None:
        self._sweep_timer = None
        self.conversation.expire(self._loop.time())
        next_deadline = self.conversation.next_deadline
        if next_deadline < math.inf:
            self._sweep_at(next_deadline)
