"""Moves sessions to the replicas that they prefer, when one comes back, is new, or is going to stop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from cellserve._backoff import Backoff
from cellserve.errors import CellserveError

if TYPE_CHECKING:
    from cellserve._hub import Hub

__all__ = ["Mover"]

_MAX_AT_ONCE: Final = 256
_LONGEST_PAUSE_SECONDS: Final = 30.0


class Mover:
    """One task for all moves of a client. Sessions that are busy are tried again later."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._task: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._looks_again = False

    def begin(self, *, looks_again: bool = False) -> None:
        """Something has changed. looks_again: the name may have other addresses now."""
        self._asked.set()
        self._looks_again |= looks_again
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._move())

    def stop(self) -> None:
        """Moves nothing any more."""
        if self._task is not None:
            self._task.cancel()

    async def _move(self) -> None:
        backoff = Backoff(_LONGEST_PAUSE_SECONDS)
        while True:
            if self._looks_again:
                self._looks_again = False
                with contextlib.suppress(CellserveError):  # what was known before is used further
                    await self._hub.look_again()
            if self._asked.is_set():
                self._asked.clear()
                backoff.reset()
            attachments = [attachment for attachment in self._hub.attachments if attachment.is_misplaced]
            if self._hub.addresses.can_change and not all(replica.is_up for replica in self._hub.replicas):
                self._looks_again = True  # what replaces it may have another address, and not at once
            elif not attachments:
                return
            for begin in range(0, len(attachments), _MAX_AT_ONCE):
                moves = [attachment.move() for attachment in attachments[begin : begin + _MAX_AT_ONCE]]
                await asyncio.gather(*moves)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_seconds()):
                    await self._asked.wait()
