"""Timeouts: checks what users pass, and turns a wait that is over into this library's exception."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from cellserve.errors import CellserveError, TimedOut

__all__ = ["Timeout", "until"]

_MAX_MILLISECONDS: Final = 2**32 - 1


class Timeout:
    """How long a call may take: a positive number of seconds; ValueError otherwise."""

    __slots__ = ("milliseconds", "seconds")

    def __init__(self, seconds: float) -> None:
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"a timeout is a positive number of seconds, not {seconds!r}")
        self.seconds = seconds
        self.milliseconds = min(max(int(seconds * 1000), 1), _MAX_MILLISECONDS)


@asynccontextmanager
async def until(deadline: float, what: str, session_id: str | None = None) -> AsyncIterator[None]:
    """Bounds what is awaited inside; deadline by the event loop's clock. Raises TimedOut."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except CellserveError:
        raise
    except TimeoutError:
        raise TimedOut(f"{what} was not done within its timeout", session_id=session_id) from None
