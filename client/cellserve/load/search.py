"""Finds how many sessions a server holds at a latency target."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from cellserve.load.results import LoadResult

__all__ = ["Trial", "most_sessions"]

_PRECISION: Final = 1.1


@dataclass(frozen=True, slots=True)
class Trial:
    """A load of so many sessions, and whether it met the target."""

    num_sessions: int
    result: LoadResult
    met: bool


async def most_sessions(
    attempt: Callable[[int], Awaitable[LoadResult]],
    *,
    first: int,
    target_p99_seconds: float,
    max_sessions: int,
) -> list[Trial]:
    """Try numbers of sessions, doubling and then halving the distance, until the answer is known to a tenth.

    attempt: loads the server with so many sessions. A load meets the target if its p99 is at most the target and
    nothing was refused. The largest number that met it is the answer; trials are returned in the order made.
    """
    trials: list[Trial] = []

    async def meets(num_sessions: int) -> bool:
        result = await attempt(num_sessions)
        p99 = result.quantile(0.99)
        met = p99 is not None and p99 <= target_p99_seconds and not result.num_failures
        trials.append(Trial(num_sessions, result, met))
        return met

    held, missed = 0, max_sessions + 1
    number = min(first, max_sessions)
    while held < max_sessions and number < missed:
        if await meets(number):
            held = number
            number = min(2 * number, max_sessions)
        else:
            missed = number
    # Where the first number was too many already, smaller ones follow.
    while missed - held > 1 and missed > _PRECISION * max(held, 1):
        number = (held + missed) // 2 if held else missed // 2
        if await meets(number):
            held = number
        else:
            missed = number
    return trials
