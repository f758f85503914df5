"""Makes room for sessions where `max_sessions` are open.

Durable sessions that nobody holds are left to the store, which costs nothing. With `evict_when_full` the longest idle
of the others go next: those that the store has are left to it, and their holders attach them again when they need
them; the rest end as evicted.
"""

from collections.abc import Collection

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.closing import Closing
from cellserve_service.core import Core
from cellserve_service.sessions import NO_STREAM, Stage
from cellserve_service.stepping import IntArray

_STALE = ErrorReason.ERROR_REASON_STALE_HANDLE


class Room:
    """The session table's room. keep: ids of sessions that must stay, whatever comes."""

    def __init__(self, core: Core, closing: Closing) -> None:
        self._core = core
        self._closing = closing

    def left(self, number: int, keep: Collection[str] = ()) -> int:
        """For how many sessions there is room, or can be made; it is looked for as far as `number`."""
        num_free = self._core.sessions.num_free
        return num_free if number <= num_free else num_free + len(self._victims(keep))

    def make(self, number: int, keep: Collection[str] = ()) -> bool:
        """Make room for so many sessions; false, and nothing has happened, where that cannot be."""
        missing = number - self._core.sessions.num_free
        if missing <= 0:
            return True
        victims = self._victims(keep)
        if len(victims) < missing:
            return False
        for row in victims[:missing]:
            self._closing.evict(row)
        return True

    def _victims(self, keep: Collection[str]) -> list[int]:
        """Rows of sessions that can go, those first that should."""
        core, sessions = self._core, self._core.sessions
        idle = sessions.is_open & (sessions.num_unfinished == 0) & (sessions.stage == Stage.IDLE)
        rows: IntArray = np.flatnonzero(idle & ~sessions.is_leaving)
        stored = np.zeros(len(rows), np.bool_) if core.keeping is None else core.keeping.is_stored(rows)
        is_free_of_cost = stored & (sessions.owner[rows] == NO_STREAM)
        may_go = is_free_of_cost
        if core.limits.evict_when_full:
            may_go = stored | ~sessions.is_durable(rows)
        order = np.lexsort((sessions.last_used[rows], ~is_free_of_cost))
        candidates = rows[order[may_go[order]]].tolist()
        claimed = () if core.keeping is None else core.keeping.claimed
        return [
            row
            for row in candidates
            if (session_id := sessions.ids[row]) is not None and session_id not in keep and session_id not in claimed
        ]
