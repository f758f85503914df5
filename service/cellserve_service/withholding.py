"""Answers that leave only once the states behind them are durable."""

from collections import deque
from collections.abc import Callable, KeysView, Sequence
from dataclasses import dataclass, field

import numpy as np

from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.messages import Answers, Done, Failures, Generated
from cellserve_service.sessions import Durability
from cellserve_service.store_requests import MOVED


@dataclass(slots=True, eq=False)
class _Withheld:
    """An event that leaves when the states of all its sessions are durable, or lost."""

    event: Answers | Generated | Done | Failures
    rows: list[int]  # of the session table, one for each row of the event
    missing: int
    lost: set[int] = field(default_factory=set)


class Withholding:
    """What waits for sessions to be durable, in order for each of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # By session row: what waits for a line and position of the session to be durable.
        self._waiting: dict[int, deque[tuple[tuple[float, float], _Withheld]]] = {}

    @property
    def rows(self) -> KeysView[int]:
        """The sessions that something waits for."""
        return self._waiting.keys()

    def withhold(
        self, event: Answers | Generated | Done | Failures, rows: Sequence[int], positions: Sequence[float]
    ) -> None:
        """Give an event out when the sessions' states are durable up to the positions: one for each of its rows.

        position: -inf for what follows the events before it, inf for what waits until the session's end is stored.
        """
        withheld = _Withheld(event, list(rows), len(rows))
        lines = self._core.sessions.line
        for row, position in zip(rows, positions, strict=True):
            self._waiting.setdefault(row, deque()).append(((int(lines[row]), position), withheld))

    def refuse_in_turn(self, row: int, stream: int, request: int, refusal: Refusal) -> None:
        """Refuse a request of a session behind what waits to be durable."""
        if row in self._waiting:
            self.withhold(Failures(stream, np.array([request], np.uint64), (refusal,)), [row], [-np.inf])
        else:
            self._core.refuse(stream, [request], [refusal])

    def may_leave(self, row: int, position: int) -> bool:
        """Whether an answer up to a position of the session may leave."""
        sessions = self._core.sessions
        return sessions.durability[row] != Durability.SYNC or (
            row not in self._waiting and int(sessions.durable_position[row]) >= position
        )

    def release(self, row: int, line: float = np.inf, position: float = np.inf) -> None:
        """Give out what waits for a session to be durable up to a position."""
        waiting = self._waiting.get(row)
        while waiting and waiting[0][0] <= (line, position):
            self._settle(waiting.popleft()[1])
        if waiting is not None and not waiting:
            del self._waiting[row]

    def end(self, row: int) -> Callable[[bool], None]:
        """The session leaves its row. Returns what must be told whether its end is stored: then what waits for it goes
        out, or is refused.
        """
        waiting = [withheld for _, withheld in self._waiting.pop(row, ())]

        def told(is_stored: bool) -> None:
            for withheld in waiting:
                if not is_stored:
                    withheld.lost.add(row)
                self._settle(withheld)

        return told

    def _settle(self, withheld: _Withheld) -> None:
        withheld.missing -= 1
        if withheld.missing:
            return
        core, event = self._core, withheld.event
        if isinstance(event, Failures):
            core.refuse(event.stream, event.requests, event.refusals)
        elif not withheld.lost:
            core.events.append(event)
        elif isinstance(event, Done):
            core.refuse(event.stream, event.requests, [MOVED] * len(event.requests))
        elif isinstance(event, Answers):
            for place, row in enumerate(withheld.rows):
                if row not in withheld.lost:
                    core.events.append(event.rows(place, place + 1))
                elif not event.remaining[place]:  # a slice is refused with the last of its run
                    core.refuse(int(event.streams[place]), event.requests[place : place + 1], [MOVED])
        elif event.finished:
            core.refuse(event.stream, [event.request], [MOVED])

    def lose(self, row: int) -> None:
        """The session is lost: what waits for it is refused."""
        self.end(row)(False)
