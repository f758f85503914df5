"""Between the event loop and the engine: gives streams their numbers and hands each its events."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from cellserve_service.messages import Command, Drained, Event


class Receiver(Protocol):
    """Whoever gets the events of a stream; called on the event loop."""

    def receive(self, event: Event) -> None: ...


class Front:
    """The servicers' side of the engine: `post` commands, receive events. Lives on the event loop."""

    def __init__(self, post: Callable[[Command], None]) -> None:
        self.post = post
        self.drained = asyncio.Event()
        self._receivers: dict[int, Receiver] = {}
        self._last_stream = 0

    def register(self, receiver: Receiver) -> int:
        """A new stream's number."""
        self._last_stream += 1
        self._receivers[self._last_stream] = receiver
        return self._last_stream

    def forget(self, stream: int) -> None:
        self._receivers.pop(stream, None)

    def deliver(self, events: list[Event]) -> None:
        """Hand out the events of a tick."""
        for event in events:
            if isinstance(event, Drained):
                self.drained.set()
                continue
            receiver = self._receivers.get(event.stream)
            if receiver is not None:
                receiver.receive(event)
