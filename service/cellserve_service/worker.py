"""A front end as a process of its own: `python -m cellserve_service.worker FD`, which the engine's process starts.

FD is its end of a socket pair. When the other end is closed, the engine's process is gone, and so is this one.
"""

import asyncio
import os
import signal
import socket
import sys

import structlog
import uvloop

from cellserve_service.collecting import settle_collector
from cellserve_service.control import (
    CannotServe,
    Count,
    Counted,
    Ended,
    Fail,
    GoUnhealthy,
    Serve,
    Serving,
    Stop,
    ToWorker,
)
from cellserve_service.errors import StartError
from cellserve_service.front_end import FrontEnd
from cellserve_service.link import Link
from cellserve_service.logs import set_up_logs
from cellserve_service.messages import Event

ORPHANED = 1


class _Worker:
    """Does what the engine's process tells it."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._link = Link(self._take_batch, self._jam, _exit_at_once)
        self._front_end: FrontEnd

    async def run(self, end: socket.socket) -> None:
        """Serve until told to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Sent to a whole group of processes, they are for the engine's, which tells what is to be done.
            loop.add_signal_handler(number, lambda: None)
        await self._link.open(end)
        serve = await self._told.get()
        assert isinstance(serve, Serve)
        set_up_logs(serve.settings)
        structlog.contextvars.bind_contextvars(worker=serve.number)
        try:
            self._front_end = FrontEnd(serve.settings, serve.listen, is_shared=True)
        except StartError as error:
            self._link.post(CannotServe(str(error)))
        else:
            settle_collector()
            await self._front_end.serve(self._link, serve.facts, serve.number)
            self._link.post(Serving())
            await self._obey()
        await self._link.close()

    async def _obey(self) -> None:
        while True:
            match await self._told.get():
                case GoUnhealthy():
                    await self._front_end.go_unhealthy()
                case Count():
                    self._link.post(Counted(self._front_end.statistics()))
                case Fail():
                    await self._front_end.fail()
                    return
                case Stop(patience_seconds):
                    in_time = await self._front_end.stop(patience_seconds)
                    self._link.post(Ended(in_time))
                    return

    def _take_batch(self, batch: list[object]) -> None:
        events: list[Event] = []
        for message in batch:
            if isinstance(message, ToWorker):
                self._told.put_nowait(message)
            else:
                events.append(message)  # type: ignore[arg-type] # which is all that there is beside
        if events:
            self._front_end.deliver(events)

    def _jam(self, jammed: bool) -> None:
        """Streams are not read while the engine takes nothing."""
        flows = self._front_end.front.flows
        if jammed:
            flows.clear()
        else:
            flows.set()


def _exit_at_once() -> None:
    """Without the engine there is nothing to be done. Clients find their connections cut, as in any crash."""
    os._exit(ORPHANED)


async def _main() -> None:
    await _Worker().run(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    uvloop.run(_main())
