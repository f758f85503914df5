"""Calls with a request id: a repeat changes nothing and gets the first answer."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cellserve.v1.session_service_pb2 import (
    CloseSessionRequest,
    CloseSessionResponse,
    ResetSessionRequest,
    ResetSessionResponse,
)
from cellserve_service.errors import Refusal, invalid, reason_name
from cellserve_service.idempotency import RequestMemory


class _Calls:
    """Resets that count themselves; each is done when `finish` is set."""

    def __init__(self, *, max_answers: int = 100) -> None:
        self.now = 0.0
        self.memory = RequestMemory(60.0, max_answers=max_answers, clock=lambda: self.now)
        self.number = 0
        self.finish = asyncio.Event()
        self.finish.set()
        self.failure: Refusal | None = None

    def reset(self, request_id: str, session_id: str = "a") -> Awaitable[ResetSessionResponse]:
        request = ResetSessionRequest(request_id=request_id, session_id=session_id)
        return self.memory.once(request_id, request, self._call)

    async def _call(self) -> ResetSessionResponse:
        self.number += 1
        epoch = self.number
        await self.finish.wait()
        if self.failure is not None:
            raise self.failure
        return ResetSessionResponse(epoch=epoch)


async def test_a_repeat_gets_the_first_answer_and_other_ids_their_own() -> None:
    calls = _Calls()
    epochs = [(await calls.reset(request_id)).epoch for request_id in ("x", "y", "x", "y", "x")]
    assert epochs == [1, 2, 1, 2, 1]


async def test_calls_without_an_id_are_all_made() -> None:
    calls = _Calls()
    assert [(await calls.reset("")).epoch for _ in range(3)] == [1, 2, 3]


async def test_an_id_used_for_another_call_is_refused() -> None:
    calls = _Calls()
    await calls.reset("x")
    with pytest.raises(Refusal):
        await calls.reset("x", session_id="b")

    async def close() -> CloseSessionResponse:
        return CloseSessionResponse()

    with pytest.raises(Refusal):
        await calls.memory.once("x", CloseSessionRequest(request_id="x", session_id="a"), close)
    assert calls.number == 1


async def test_an_id_that_is_too_long_is_refused() -> None:
    calls = _Calls()
    await calls.reset("x" * 128)
    with pytest.raises(Refusal) as caught:
        await calls.reset("x" * 129)
    assert reason_name(caught.value.reason) == "INVALID_INPUT"


async def test_a_refused_call_is_not_remembered() -> None:
    calls = _Calls()
    calls.failure = invalid("not now")
    with pytest.raises(Refusal):
        await calls.reset("x")
    calls.failure = None
    assert (await calls.reset("x")).epoch == 2


async def test_repeats_of_a_call_that_still_goes_on_wait_for_it() -> None:
    calls = _Calls()
    calls.finish.clear()
    waiting = [asyncio.ensure_future(calls.reset("x")) for _ in range(3)]
    await asyncio.sleep(0)
    calls.finish.set()
    assert [(await answer).epoch for answer in waiting] == [1, 1, 1]


async def test_a_call_goes_on_when_its_first_caller_goes_away() -> None:
    calls = _Calls()
    calls.finish.clear()
    first = asyncio.ensure_future(calls.reset("x"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    calls.finish.set()
    assert (await calls.reset("x")).epoch == 1


async def test_answers_are_forgotten_after_their_time() -> None:
    calls = _Calls()
    await calls.reset("x")
    calls.now = 59.0
    assert (await calls.reset("x")).epoch == 1
    calls.now = 61.0
    assert (await calls.reset("x")).epoch == 2


async def test_only_so_many_answers_are_remembered() -> None:
    calls = _Calls(max_answers=2)
    epochs = [(await calls.reset(request_id)).epoch for request_id in ("x", "y", "x", "z", "y", "x")]
    assert epochs == [1, 2, 1, 3, 2, 4]


async def test_a_call_that_fails_late_does_not_take_the_memory_of_a_later_one() -> None:
    calls = _Calls(max_answers=1)
    calls.finish.clear()
    calls.failure = invalid("too late")
    first = asyncio.ensure_future(_outcome(lambda: calls.reset("x")))
    await asyncio.sleep(0)
    other = asyncio.ensure_future(_outcome(lambda: calls.reset("y")))
    await asyncio.sleep(0)
    again = asyncio.ensure_future(_outcome(lambda: calls.reset("x")))
    await asyncio.sleep(0)
    calls.finish.set()
    assert [await call for call in (first, other, again)] == [None, None, None]
    calls.failure = None
    epoch = (await calls.reset("x")).epoch
    assert (await calls.reset("x")).epoch == epoch


async def _outcome(call: Callable[[], Awaitable[ResetSessionResponse]]) -> ResetSessionResponse | None:
    try:
        return await call()
    except Refusal:
        return None
