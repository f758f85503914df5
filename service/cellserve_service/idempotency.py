"""Remembers the answers of calls that carry a request id, so that a repeat changes nothing."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from cellserve_service.errors import invalid

MAX_REQUEST_ID_LENGTH = 128

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class _Remembered:
    asked: bytes
    answer: "asyncio.Future[Any]"
    at: float


class RequestMemory:
    """Answers by request id, for a while; a refused call is not remembered, so that it can be tried again."""

    def __init__(
        self, seconds: float, *, max_answers: int = 65536, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._max_answers = max_answers
        self._clock = clock
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()

    async def once(self, request_id: str, request: Message, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Make the call, or give the answer of the same call made before. Raises Refusal."""
        if not request_id:
            return await call()
        if len(request_id) > MAX_REQUEST_ID_LENGTH:
            raise invalid(f"the request id has over {MAX_REQUEST_ID_LENGTH} characters", "request_id")
        self._forget_old()
        asked = type(request).__name__.encode() + request.SerializeToString(deterministic=True)
        known = self._remembered.get(request_id)
        if known is None:
            if len(self._remembered) >= self._max_answers:
                self._remembered.popitem(last=False)
            # The call goes on when its first caller goes away: a repeat may be on its way already.
            answer = asyncio.ensure_future(call())
            known = _Remembered(asked, answer, self._clock())
            self._remembered[request_id] = known
            answer.add_done_callback(lambda done: self._drop_failed(request_id, done))
        elif known.asked != asked:
            raise invalid("the request id was used for another call", "request_id")
        # What was asked begins with the request's type, so the answer is of the type that this call gives.
        return cast(Answer, await asyncio.shield(known.answer))

    def _drop_failed(self, request_id: str, done: "asyncio.Future[Any]") -> None:
        if done.cancelled() or done.exception() is not None:
            known = self._remembered.get(request_id)
            if known is not None and known.answer is done:
                del self._remembered[request_id]

    def _forget_old(self) -> None:
        oldest = self._clock() - self._seconds
        while self._remembered and next(iter(self._remembered.values())).at < oldest:
            self._remembered.popitem(last=False)
