"""Between the event loop and the engine: gives streams their numbers and hands each its events."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from cellserve_service.messages import Command, EndStream, Event, StartStream

# Streams of the front end n have the numbers from n * 2**40 on.
STREAM_BITS = 40


class Receiver(Protocol):
    """Whoever gets the events of a stream; called on the event loop."""

    def receive(self, event: Event) -> None: ...


class Front:
    """The servicers' side of the engine: `post` commands, receive events. Lives on the event loop.

    `flows` is clear while commands pile up on the way to the engine: nothing more should be read then.
    """

    def __init__(self, post: Callable[[Command], None], number: int = 0) -> None:
        self.post = post
        self.flows = asyncio.Event()
        self.flows.set()
        self._receivers: dict[int, Receiver] = {}
        self._last_stream = number << STREAM_BITS

    def register(self, receiver: Receiver) -> int:
        """A new stream's number."""
        self._last_stream += 1
        self._receivers[self._last_stream] = receiver
        self.post(StartStream(self._last_stream))
        return self._last_stream

    def forget(self, stream: int) -> None:
        """The stream has ended."""
        del self._receivers[stream]
        self.post(EndStream(stream))

    def deliver(self, events: Sequence[Event]) -> None:
        """Hand out events."""
        for event in events:
            receiver = self._receivers.get(event.stream)
            if receiver is not None:
                receiver.receive(event)
