"""Between the event loop and the engine: gives streams their numbers and hands each its events."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from cellserve_service.encoding import encode_rows
from cellserve_service.messages import Answers, Command, EndStream, Event, StartStream
from cellserve_service.pools import stretches

# Streams of the front end n have the numbers from n * 2**40 on.
STREAM_BITS = 40


class Receiver(Protocol):
    """Whoever gets the events of a stream; called on the event loop."""

    def receive(self, event: Event) -> None: ...

    def receive_row(self, answers: Answers, row: int, frame: bytes) -> None:
        """One row of answers to many streams, and the frame that tells it."""


class Outlet(Protocol):
    """Where commands go to the engine, or on their way to it."""

    def post(self, command: Command) -> None: ...

    def announce(self, take: Callable[[], None]) -> None:
        """Commands are about to come: `take`, always the same, is called before what was posted goes on."""


class Front:
    """The servicers' side of the engine: `post` commands, receive events. Lives on the event loop.

    `flows` is clear while commands pile up on the way to the engine: nothing more should be read then.
    """

    def __init__(self, outlet: Outlet, number: int = 0) -> None:
        self.post = outlet.post
        self.announce = outlet.announce
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
            if isinstance(event, Answers):
                self._deliver_answers(event)
            else:
                self._deliver(event.stream, event)

    def _deliver(self, stream: int, event: Event) -> None:
        receiver = self._receivers.get(stream)
        if receiver is not None:
            receiver.receive(event)

    def _deliver_answers(self, answers: Answers) -> None:
        """Give each stream its rows. Those of streams with one row are encoded together, if they are of one size."""
        streams, sizes = answers.streams, answers.num_output_rows
        firsts, lengths = stretches(streams)
        if len(firsts) == 1:
            self._deliver(int(streams[0]), answers)
            return
        together = (lengths == 1) & (sizes[firsts] == sizes[firsts[0]])
        if np.count_nonzero(together) < len(lengths):
            for first, length in zip(firsts[~together].tolist(), lengths[~together].tolist(), strict=True):
                self._deliver(int(streams[first]), answers.rows(first, first + length))
            answers = answers.at(firsts[together])
        if len(answers.streams):
            rows = zip(answers.streams.tolist(), encode_rows(answers), strict=True)
            for row, (stream, frame) in enumerate(rows):
                receiver = self._receivers.get(stream)
                if receiver is not None:
                    receiver.receive_row(answers, row, frame)
