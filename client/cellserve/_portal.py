"""The event loop behind the blocking client: one thread for all the clients of a process.

One, because gRPC wakes every event loop of a process for every message.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from cellserve.errors import ClosedError

__all__ = ["Portal"]

T = TypeVar("T")


class Portal:
    """The way into the shared loop for one client, from any thread; the loop ends with the last portal."""

    def __init__(self) -> None:
        with _lock:
            self._loop: asyncio.AbstractEventLoop | None = _shared.enter()

    @property
    def is_closed(self) -> bool:
        return self._loop is None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop, and waits for what it returns or raises."""
        loop = self._loop
        if loop is None:
            coroutine.close()
            raise ClosedError("this client was closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClosedError("this client was closed while the call was under way") from None
        except BaseException:  # a KeyboardInterrupt while waiting, say
            future.cancel()
            raise

    def close(self) -> None:
        """Leaves the loop; a second time does nothing."""
        with _lock:
            if self._loop is not None:
                self._loop = None
                _shared.leave()


class _SharedLoop:
    """A loop on a thread of its own, started for the first who enters and stopped when the last leaves."""

    def __init__(self) -> None:
        self._num_users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def enter(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon, so that a client that nobody closed does not keep the process.
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="cellserve-client", daemon=True)
            self._thread.start()
        self._num_users += 1
        return self._loop

    def leave(self) -> None:
        self._num_users -= 1
        if self._num_users or self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop = self._thread = None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


_lock: Final = threading.Lock()
_shared: Final = _SharedLoop()
