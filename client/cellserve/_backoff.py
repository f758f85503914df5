"""How long to wait before the next attempt: longer after each failure, and never in step with other clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from cellserve._status import is_passing
from cellserve.errors import CellserveError, TimedOut

__all__ = ["Backoff", "Patience", "retried"]

T = TypeVar("T")

_FIRST_SECONDS: Final = 0.02
_LONGEST_SECONDS: Final = 1.0
# Before a deadline: what is to be said of the failures is said by then.
_LAST_SECONDS: Final = 0.005


# A network can lose what was sent without breaking the connection: a proxy that restarts, say.
_FIRST_PATIENCE_SECONDS: Final = 10.0
_LONGEST_PATIENCE_SECONDS: Final = 160.0


class Patience:
    """How long silence about a request is taken for work on it, and not for the request, or its answer, being lost.

    It doubles each time, so that a server that really takes so long is not asked over and over.
    """

    def __init__(self) -> None:
        self.seconds = _FIRST_PATIENCE_SECONDS

    def wear_out(self) -> None:
        """It was in vain: the next silence may last longer."""
        self.seconds = min(2 * self.seconds, _LONGEST_PATIENCE_SECONDS)

    def renew(self) -> None:
        """An answer has come."""
        self.seconds = _FIRST_PATIENCE_SECONDS


class Backoff:
    """Pauses that double, up to a longest one; each is drawn from the upper half of its length."""

    def __init__(self, longest_seconds: float = _LONGEST_SECONDS) -> None:
        self._longest_seconds = longest_seconds
        self._seconds = _FIRST_SECONDS

    def next_seconds(self) -> float:
        """The pause before the next attempt."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._longest_seconds)
        return random.uniform(0.5, 1.0) * seconds

    def reset(self) -> None:
        """An attempt has succeeded."""
        self._seconds = _FIRST_SECONDS


async def retried(attempt: Callable[[float], Awaitable[T]], deadline: float) -> T:
    """Awaits attempt(seconds) until it does not fail by something that passes, or the deadline is near.

    An attempt gets fewer seconds than are left, for its request may have been lost.

    What it failed by last is then raised; so whatever attempt does can be done again without harm.
    """
    loop, backoff, patience = asyncio.get_running_loop(), Backoff(), Patience()
    trouble: CellserveError | None = None
    while True:
        try:
            seconds = max(deadline - loop.time(), _LAST_SECONDS)
            return await attempt(min(seconds, patience.seconds))
        except CellserveError as error:
            is_lost = isinstance(error, TimedOut) and error.reason is None and seconds > patience.seconds
            if isinstance(error, TimedOut) and not is_lost and trouble is not None:
                raise trouble from None
            if not is_lost and not is_passing(error):
                raise
            trouble = error
            if is_lost:
                patience.wear_out()
        seconds_left = deadline - loop.time() - _LAST_SECONDS
        if seconds_left <= 0:
            raise trouble
        await asyncio.sleep(min(backoff.next_seconds(), seconds_left))
