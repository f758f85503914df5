"""Cancels a coroutine at every one of its awaits, and after any number of turns of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["Interrupted", "When", "interruptions", "prepared"]

# A caller who is cancelled is let go at once, whatever the server does.
_PROMPTLY_SECONDS: Final = 1.0
_MOST_TURNS: Final = 100_000

# turns: after so many turns of the loop. waiting: as soon as the task waits for so manieth time. answered: when what it
# then waits for has come, and the task has not seen it yet.
When = Literal["turns", "waiting", "answered"]


@dataclass(frozen=True)
class Interrupted:
    """What became of a call. was_begun: whether its first line has run."""

    when: When
    number: int
    was_begun: bool
    is_finished: bool
    result: Any = None


class _Awaits:
    """Awaits a coroutine, and cancels the task that does at one of its awaits."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], when: When, number: int) -> None:
        self._coroutine = coroutine
        self._when = when
        self._number = number
        self.was_begun = False

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        self.was_begun = True
        steps, thrown, num_awaits = self._coroutine.__await__(), None, 0
        while True:
            try:
                future = next(steps) if thrown is None else steps.throw(thrown)
            except StopIteration as stop:
                return stop.value
            thrown = None
            if num_awaits == self._number and self._when != "turns":
                if self._when == "answered" and future is not None:
                    # Before the task's own callback, which is added next.
                    future.add_done_callback(lambda _: task.cancel())
                else:
                    asyncio.get_running_loop().call_soon(task.cancel)
            num_awaits += 1
            try:
                yield future
            except BaseException as error:
                thrown = error


async def _interrupt(call: Coroutine[Any, Any, Any], when: When, number: int) -> Interrupted:
    awaits = _Awaits(call, when, number)

    async def run() -> Any:
        return await awaits

    task = asyncio.create_task(run())
    if when == "turns":
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
    done, _ = await asyncio.wait([task], timeout=None if when == "answered" else _PROMPTLY_SECONDS)
    assert done, f"{call} was cancelled and goes on"
    if not awaits.was_begun:
        call.close()
    if task.cancelled():
        return Interrupted(when, number, awaits.was_begun, is_finished=False)
    return Interrupted(when, number, awaits.was_begun, is_finished=True, result=task.result())


async def interruptions(
    prepare: Callable[[], Awaitable[Callable[[], Coroutine[Any, Any, Any]]]], num_turns: int = 12
) -> AsyncIterator[Interrupted]:
    """Calls what was prepared again and again, each time cancelled later, until it finishes before that.

    num_turns: for about so many numbers of turns between none and what an undisturbed call takes.
    """
    for when in ("waiting", "answered"):
        number, is_finished = 0, False
        while not is_finished:
            interrupted = await _interrupt((await prepare())(), when, number)
            yield interrupted
            number, is_finished = number + 1, interrupted.is_finished
    call = asyncio.create_task((await prepare())())
    most = 0
    while not call.done():
        await asyncio.sleep(0)
        most += 1
    yield Interrupted("turns", most, was_begun=True, is_finished=True, result=call.result())
    number, is_finished = 0, False
    while not is_finished or number < most:
        interrupted = await _interrupt((await prepare())(), "turns", number)
        assert number or not interrupted.was_begun
        assert number < _MOST_TURNS
        yield interrupted
        is_finished = interrupted.is_finished
        number += 1 if number < num_turns // 3 else max(1, 3 * most // (2 * num_turns))


def prepared(call: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], Awaitable[Callable[[], Any]]]:
    """A call that needs no preparation."""

    async def prepare() -> Callable[[], Any]:
        return call

    return prepare
