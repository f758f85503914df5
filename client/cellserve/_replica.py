"""One server process as a client sees it: its channel, its stream, and whether it is worth asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from cellserve._backoff import Backoff, Patience
from cellserve._info import ServerLimits
from cellserve._stream import Connection
from cellserve._transport import Transport
from cellserve.errors import CellserveError

__all__ = ["Replica"]

_LONGEST_PROBE_SECONDS: Final = 5.0


class Replica:
    """A server at one address. Belongs to the running event loop.

    is_up: whether it is believed to serve. A stream that breaks is begun again at once; a server that answers
    nothing on a new one, and one that drains, is down until its health service says otherwise. on_change: called
    when that changes.
    """

    def __init__(self, transport: Transport, on_change: Callable[[Replica], None]) -> None:
        self.transport = transport
        self.target = transport.target
        self.is_up = True
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self._connection: Connection | None = None
        self._backoff = Backoff()
        self._patience = Patience()
        self._begins_at = 0.0  # when the next stream may begin
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_draining(self) -> bool:
        """Whether it has said on its stream that it will stop."""
        connection = self._connection
        return connection is not None and connection.is_open and connection.conversation.is_draining

    async def connect(self, limits: ServerLimits) -> Connection:
        """The open stream; a new one where there is none, not sooner than the failures before allow."""
        while self._connection is None or not self._connection.is_open:
            pause_seconds = self._begins_at - self._loop.time()
            if pause_seconds <= 0:
                self._connection = Connection(
                    self.transport.open_stream(), limits, self._drains, self._ended, self._patience
                )
            else:
                await asyncio.sleep(pause_seconds)
        return self._connection

    def failed(self) -> None:
        """A call could not be made because nobody answered."""
        if self._connection is None or not self._connection.is_open:
            self._go_down()

    async def close(self, deadline: float) -> None:
        """Ends the stream in order, and closes the channel."""
        if self._probe is not None:
            self._probe.cancel()
        if self._connection is not None:
            await self._connection.finish(deadline)
        await self.transport.close()

    def _ended(self, connection: Connection) -> None:
        if connection.has_heard:
            self._backoff.reset()
        else:
            self._go_down()
        self._begins_at = self._loop.time() + self._backoff.next_seconds()

    def _drains(self) -> None:
        self._go_down()

    def _go_down(self) -> None:
        if not self.is_up or self.transport.is_closed:
            return
        self.is_up = False
        self._probe = self._loop.create_task(self._probe_until_up())
        self._on_change(self)

    async def _probe_until_up(self) -> None:
        backoff = Backoff(_LONGEST_PROBE_SECONDS)
        while not self.is_up:
            await asyncio.sleep(backoff.next_seconds())
            try:
                await self.transport.check_health(_LONGEST_PROBE_SECONDS)
            except CellserveError:
                continue
            self.is_up = True
            self._begins_at = 0.0
        self._on_change(self)
