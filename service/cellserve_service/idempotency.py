"""Remembers the answers of calls that carry a request id, so that a repeat changes nothing.

It stands before the engine, and sees what goes in and what comes out. So a repeat is known whichever front end it
reaches, and the answer too when the front end that asked first is gone.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from cellserve_service.errors import invalid
from cellserve_service.messages import (
    Command,
    Done,
    Event,
    Failures,
    Opened,
    OpenSessions,
    SessionForked,
    SessionTarget,
)

MAX_REQUEST_ID_LENGTH = 128

_Asker = tuple[int, int]  # stream and request


@dataclass(slots=True)
class _Remembered:
    request_id: str
    digest: bytes
    at: float
    answer: Event | None = None
    waiting: list[_Asker] = field(default_factory=list)  # repeats that came before the answer


class RequestMemory:
    """Answers by request id, for a while; a refused call is not remembered, so that it can be tried again."""

    def __init__(self, seconds: float, *, max_answers: int = 65536) -> None:
        self._seconds = seconds
        self._max_answers = max_answers
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._unanswered: dict[_Asker, _Remembered] = {}
        self._answers: list[Event] = []

    def knows(self, command: Command, now: float) -> bool:
        """Whether a command is answered from here, or with the call that it repeats; otherwise it is to be done."""
        asked = _asked(command)
        if asked is None:
            return False
        stream, requests = asked.stream, asked.requests
        asker, request_id = (stream, int(requests[0])), asked.request_id
        if len(request_id) > MAX_REQUEST_ID_LENGTH:
            refusal = invalid(f"the request id has over {MAX_REQUEST_ID_LENGTH} characters", "request_id")
            self._answers.append(Failures(stream, requests[:1], (refusal,)))
            return True
        self._forget_old(now)
        known = self._remembered.get(request_id)
        if known is None:
            if len(self._remembered) >= self._max_answers:
                self._remembered.popitem(last=False)
            known = _Remembered(request_id, asked.request_digest, now)
            self._remembered[request_id] = self._unanswered[asker] = known
            return False
        if known.digest != asked.request_digest:
            refusal = invalid("the request id was used for another call", "request_id")
            self._answers.append(Failures(stream, requests[:1], (refusal,)))
        elif known.answer is None:
            known.waiting.append(asker)
        else:
            self._answers.append(_to(asker, known.answer))
        return True

    def see(self, events: list[Event]) -> list[Event]:
        """Take what the engine gives out; returns that with the answers of repeats."""
        repeats, self._answers = self._answers, []
        if not self._unanswered:
            return events + repeats
        for event in events:
            for asker in _answered(event):
                known = self._unanswered.pop(asker, None)
                if known is None:
                    continue
                repeats += [_to(other, event) for other in known.waiting]
                known.answer, known.waiting = event, []
                if isinstance(event, Failures) and self._remembered.get(known.request_id) is known:
                    del self._remembered[known.request_id]
        return events + repeats

    def _forget_old(self, now: float) -> None:
        while self._remembered and next(iter(self._remembered.values())).at < now - self._seconds:
            self._remembered.popitem(last=False)


def _asked(command: Command) -> OpenSessions | SessionTarget | None:
    """The part of a command that has the request id, where there is one."""
    part = cast(OpenSessions | SessionTarget, getattr(command, "target", command))
    return part if getattr(part, "request_id", "") else None


def _answered(event: Event) -> Iterator[_Asker]:
    """Whom an event answers, if it is of the kinds that answer calls with a request id."""
    if isinstance(event, SessionForked):
        yield event.stream, event.request
    elif isinstance(event, Failures):
        yield from ((event.stream, request) for request in event.requests.tolist())
    elif isinstance(event, Opened | Done):
        yield event.stream, int(event.requests[0])


def _to(asker: _Asker, event: Event) -> Event:
    """An answer, for another call."""
    stream, request = asker
    match event:
        case SessionForked():
            return replace(event, stream=stream, request=request)
        case Opened() | Done() | Failures():
            return replace(event, stream=stream, requests=np.full_like(event.requests, request))
        case _:
            raise AssertionError(f"{type(event).__name__} answers no call with a request id")
