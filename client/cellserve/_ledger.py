"""Keeps the positions of one session: what its answers have confirmed, what is on its way, what is in doubt.

A run is sent for the position where the run before it ends, so that runs can follow each other without
waiting. When one fails, or is given up, those behind it fail too; the session settles: it sends nothing until
every run on its way is answered, and goes on from where the server then stands.
"""

from __future__ import annotations

import asyncio

from cellserve._status import lost_error
from cellserve.errors import CellserveError, ConnectionLost, PositionError, SessionLost, StaleHandle

__all__ = ["Ledger"]


class Ledger:
    """Positions count tokens. `ready` tells in one look whether a run may be sent now."""

    __slots__ = (
        "_changed",
        "_is_watched",
        "_position_told",
        "_silent_doubt",
        "_told_doubt",
        "adopts_position",
        "blocked",
        "durable_position",
        "epoch",
        "handle",
        "last_command",
        "lost_reason",
        "next_position",
        "num_unanswered",
        "num_waiting",
        "position",
        "ready",
        "session_id",
        "settling",
    )

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.handle: int | None = None  # valid on the stream that the session is attached to
        self.epoch = 0
        self.position = 0  # confirmed by answers
        self.next_position = 0  # where the next run begins
        self.durable_position: int | None = None
        self.num_unanswered = 0  # runs
        self.last_command = 0  # of the outbox: the one that has this session's last row
        self.settling = False
        # Whether the next attach takes the server's position over, because ours is not known, or not any
        # more.
        self.adopts_position = True
        self.lost_reason: str | None = None
        self.num_waiting = 0  # calls that wait for their turn; a new one goes behind them
        self.blocked = False  # closed, detached or generating: the session object decides
        self.ready = False
        self._position_told: int | None = None
        self._silent_doubt = False
        self._told_doubt = False
        self._changed: asyncio.Future[None] | None = None
        self._is_watched = False

    def attach(self, handle: int, epoch: int, position: int) -> None:
        """The session is held by a stream; runs can be sent."""
        self.handle = handle
        self.epoch = epoch
        if self.adopts_position:
            self.adopts_position = False
            self.position = self.next_position = position
        self.update()

    def detach(self) -> None:
        """The handle is of no use any more; the session is attached again before its next run."""
        self.handle = None
        self.update()

    def lose(self, reason: str) -> None:
        """The session has ended, or is somebody else's."""
        self.lost_reason = self.lost_reason or reason
        self.handle = None
        self.update()
        self._wake()

    def reserve(self, count: int) -> int:
        """Takes the next count positions for a run, and returns the first."""
        position = self.next_position
        self.next_position = position + count
        self.num_unanswered += 1
        return position

    def answered(self, position: int) -> None:
        """A run was answered; the session stands at position."""
        self.position = position
        self.num_unanswered -= 1
        if self._is_watched:
            self._position_told = None
            self._progress()

    def failed(self, error: CellserveError, *, given_up: bool) -> None:
        """A run was refused, withdrawn, or its connection lost. given_up: nobody waits for its outcome any more."""
        self.num_unanswered -= 1
        self.settling = True
        if isinstance(error, PositionError):
            self._position_told = error.position
        elif isinstance(error, ConnectionLost) and error.in_doubt:
            self._silent_doubt |= given_up
            self._told_doubt |= not given_up
        elif isinstance(error, SessionLost) and error.reason is not None:
            self.lose(error.reason)
        self._progress()

    def why(self, error: CellserveError) -> CellserveError:
        """The failure of a run as its caller should see it."""
        if isinstance(error, StaleHandle) and self.lost_reason is not None:
            # The handle is of no use any more, and a notice has said before why that is.
            return lost_error(self.lost_reason, self.session_id)
        error.session_id = self.session_id
        return error

    def give_up(self) -> None:
        """Nobody waits for a run any more that is on its way; the next one waits until its outcome is known."""
        self.settling = True
        self._progress()

    def stand_at(self, epoch: int, position: int) -> None:
        """The server has said where the session stands, which is not attached."""
        self.epoch = epoch
        self.adopts_position = False
        self.position = self.next_position = position

    def move_to(self, position: int) -> None:
        """The session stands at position by other means than a run."""
        self.position = position
        if not self.num_unanswered:
            self.next_position = position

    async def changes(self) -> None:
        """Waits until a run has been answered or something else has changed. One caller at a time."""
        self._changed = asyncio.get_running_loop().create_future()
        self.update()
        try:
            await self._changed
        finally:
            self._changed = None
            self.update()

    def update(self) -> None:
        """Works out what follows from the other attributes."""
        self.ready = self.handle is not None and not self.settling and not self.num_waiting and not self.blocked
        self._is_watched = self.settling or self._changed is not None

    def _progress(self) -> None:
        if self.settling and not self.num_unanswered:
            if self._position_told is not None:
                self.position = self._position_told
            if self._silent_doubt and not self._told_doubt:
                # Nobody was told of the doubt, so nobody will repeat the run: the server's word counts.
                self.adopts_position = True
            self.next_position = self.position
            self.settling = self._silent_doubt = self._told_doubt = False
            self._position_told = None
        self.update()
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
