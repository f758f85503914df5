"""A front end in a process of its own, as the engine's process sees it."""

import asyncio
import contextlib
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from typing import Self

from cellserve_service.control import CannotServe, Count, Counted, Ended, FromWorker, Serving
from cellserve_service.link import Link
from cellserve_service.messages import Command, EndStream, SetStreamPaused, StartStream
from cellserve_service.statistics import FrontStatistics


class WorkerProcess:
    """number: of this one and no other before or after it. post: takes its commands."""

    def __init__(self, number: int, post: Callable[[Command], None]) -> None:
        self.number = number
        self.link = Link(self._take_batch, self._jam, self._lose)
        self.process: Process
        self.is_gone = asyncio.Event()
        self.counted = FrontStatistics()
        self.ended_in_time = False
        # Gets why it does not serve, or None when it does.
        self.refusal: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._post = post
        self._rests: dict[int, bool] = {}  # by stream: whether the worker wants it to
        self._counting: list[asyncio.Future[None]] = []

    async def start(self) -> Self:
        """Start the process, which then waits to be told to serve."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            # -P: what lies in the working directory is not to be taken for modules.
            command = (sys.executable, "-P", "-m", "cellserve_service.worker", str(number))
            self.process = await asyncio.create_subprocess_exec(*command, pass_fds=(number,), stdin=DEVNULL)
        await self.link.open(ours)
        return self

    async def count(self) -> None:
        """Wait until the worker has told anew what it has counted."""
        if self.is_gone.is_set():
            return
        told = asyncio.get_running_loop().create_future()
        self._counting.append(told)
        self.link.post(Count())
        await told

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def end_streams(self) -> None:
        """Let the engine know that nobody is left who listens."""
        for stream in self._rests:
            self._post(EndStream(stream))
        self._rests.clear()

    def _take_batch(self, batch: list[object]) -> None:
        for message in batch:
            if isinstance(message, FromWorker):
                self._take(message)
                continue
            command: Command = message  # type: ignore[assignment] # which is all that there is beside
            match command:
                case StartStream():
                    self._rests[command.stream] = False
                case EndStream():
                    self._rests.pop(command.stream, None)
                case SetStreamPaused():
                    self._rests[command.stream] = command.paused
            self._post(command)

    def _take(self, message: FromWorker) -> None:
        match message:
            case Serving():
                self._resolve(None)
            case CannotServe():
                self._resolve(message.message)
            case Ended():
                self.ended_in_time = message.in_time
            case Counted():
                self.counted = message.statistics
                self._told()

    def _resolve(self, refusal: str | None) -> None:
        if not self.refusal.done():
            self.refusal.set_result(refusal)

    def _told(self) -> None:
        counting, self._counting = self._counting, []
        for told in counting:
            if not told.done():
                told.set_result(None)

    def _jam(self, jammed: bool) -> None:
        """While the worker takes nothing, nothing is taken from it, and what its streams asked for rests."""
        self.link.rest(jammed)
        for stream, rests in self._rests.items():
            if not rests:
                self._post(SetStreamPaused(stream, paused=jammed))

    def _lose(self) -> None:
        self._resolve("a front-end process ended before it served")
        self._told()
        self.is_gone.set()
