"""One end of the socket between the engine's process and a front-end process.

What is sent in one turn of the event loop goes as one batch: its length, then its bytes (codec.py).
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

from cellserve_service.codec import decode, encode

# Beyond this the other end is slow, and whoever sends is asked to rest.
MAX_UNSENT_BYTES = 8 * 2**20

_LENGTH = struct.Struct("<Q")


class Link(asyncio.Protocol):
    """received: takes a batch. jammed: told when the other end is slow, and when it no longer is. lost: it is gone."""

    def __init__(
        self,
        received: Callable[[list[object]], None],
        jammed: Callable[[bool], None],
        lost: Callable[[], None],
    ) -> None:
        self._received = received
        self._jammed = jammed
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._is_lost = asyncio.Event()
        self._is_closing = False
        self._incoming = bytearray()
        self._outgoing: list[object] = []
        self._take: Callable[[], None] | None = None
        self._will_flush = False

    async def open(self, end: socket.socket) -> None:
        """Begin to send and receive. end: a connected socket, which is the link's from now on."""
        end.setblocking(False)
        await self._loop.create_connection(lambda: self, sock=end)

    def post(self, message: object) -> None:
        """Send a message with the others of this turn of the event loop."""
        self._outgoing.append(message)
        self._flush_soon()

    def announce(self, take: Callable[[], None]) -> None:
        """Call `take`, always the same, for messages to be sent with those of this turn."""
        self._take = take
        self._flush_soon()

    def rest(self, resting: bool) -> None:
        """Whether to leave unread what the other end sends."""
        if resting:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    async def close(self) -> None:
        """Send what is to be sent, then close; `lost` is not told."""
        self._is_closing = True
        self._flush()
        self._transport.close()
        await self._is_lost.wait()

    def _flush_soon(self) -> None:
        if not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        try:
            if self._take is not None:
                take, self._take = self._take, None
                take()
        finally:
            self._will_flush = False
        batch, self._outgoing = self._outgoing, []
        if batch and not self._transport.is_closing():
            data = encode(batch)
            self._transport.writelines((_LENGTH.pack(len(data)), data))

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(MAX_UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        incoming = self._incoming
        incoming += data
        begin = 0
        while len(incoming) >= begin + _LENGTH.size:
            [length] = _LENGTH.unpack_from(incoming, begin)
            end = begin + _LENGTH.size + length
            if len(incoming) < end:
                break
            batch = decode(bytes(memoryview(incoming)[begin + _LENGTH.size : end]))
            begin = end
            self._received(batch)
        del incoming[:begin]

    def pause_writing(self) -> None:
        self._jammed(True)

    def resume_writing(self) -> None:
        self._jammed(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost.set()
        if not self._is_closing:
            self._lost()
