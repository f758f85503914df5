"""Keeps the positions of one session: what its answers have confirmed, what is on its way, what can be replayed.

A run is sent for the position where the run before it ends, so that runs can follow each other without
waiting. When one fails, or is given up, those behind it fail too; the session settles: it sends nothing until
every run on its way is answered, and goes on from where the server then stands. Runs whose stream has ended are
stranded: whether they have run is known when the session is attached again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from cellserve._kept import KeptTokens, KeptVectors
from cellserve._status import lost_error
from cellserve.errors import CellserveError, PositionError, SessionLost, StaleHandle

if TYPE_CHECKING:
    from cellserve._runs import Run
    from cellserve._tokens import TokenColumn, VectorColumn

__all__ = ["Ledger", "LedgerOwner"]

_UNBOUNDED: Final = 2**64


class LedgerOwner(Protocol):
    """Who attaches the session, again and again."""

    def stream_lost(self, trouble: CellserveError) -> None:
        """The session's handle is of no use any more, and runs may be stranded."""

    def give_up(self, run: Run) -> None:
        """Nobody waits any more for a run, whose answer is cancelled: it is withdrawn, if it has not begun."""


class Ledger:
    """Positions count tokens. `ready` tells in one look whether a run may be sent now.

    kept: the tokens that the server may ask for again, to which keep_token adds one; None where the session is not to
    outlive the server. kept_limit: the position up to which runs may be sent before more tokens are safe in the
    server's store. is_watched: whether somebody waits for an answer to any run of the session.
    """

    __slots__ = (
        "_max_kept_tokens",
        "_position_told",
        "_watchers",
        "adopts_position",
        "blocked",
        "durability",
        "durable_position",
        "epoch",
        "handle",
        "is_watched",
        "keep_token",
        "kept",
        "kept_limit",
        "last_command",
        "lost_reason",
        "next_position",
        "num_unanswered",
        "num_waiting",
        "owner",
        "position",
        "ready",
        "session_id",
        "settling",
        "stranded",
        "unanswered_bytes",
    )

    def __init__(self, session_id: str, owner: LedgerOwner | None = None) -> None:
        self.session_id = session_id
        self.owner = owner
        self.handle: int | None = None  # valid on the stream that the session is attached to
        self.epoch = 0
        self.position = 0  # confirmed by answers
        self.next_position = 0  # where the next run begins
        self.durability = "none"
        self.durable_position: int | None = None
        self.kept: KeptTokens | KeptVectors | None = None
        self.keep_token: Callable[[int], None] | None = None
        self.kept_limit = _UNBOUNDED
        self._max_kept_tokens = 0
        self.num_unanswered = 0  # runs, stranded ones among them
        self.unanswered_bytes = 0  # of outputs that they ask for
        self.stranded: list[Run] = []  # in the order of their positions
        self.last_command = 0  # of the outbox: the one that has this session's last row
        self.settling = False
        # Whether the next attach takes the server's position over, because ours is not known, or not any
        # more.
        self.adopts_position = True
        self.lost_reason: str | None = None
        self.num_waiting = 0  # calls that wait for their turn; a new one goes behind them
        self.blocked = False  # closed, detached, generating or being made whole: the attachment decides
        self.ready = False
        self._position_told: int | None = None
        self._watchers: list[asyncio.Future[None]] = []
        self.is_watched = False

    def keep(self, durability: str, max_kept_tokens: int, *, vectors: bool) -> None:
        """The session's durability is known: from now on its tokens are kept until they are safe, where any are."""
        self.durability = durability
        if durability != "none" and self.kept is None:
            self._max_kept_tokens = max_kept_tokens
            self.kept = KeptVectors(self.position) if vectors else KeptTokens(self.position)
            self.keep_token = self.kept.append
            self.kept_limit = self.position + max_kept_tokens

    def attach(self, handle: int, epoch: int, position: int) -> None:
        """The session is held by a stream; runs can be sent."""
        self.handle = handle
        self.epoch = epoch
        self.last_command = 0
        if self.adopts_position:
            self.adopts_position = False
            self.stand_at(position)
        self.update()

    def detach(self) -> None:
        """The handle is of no use any more; the session is attached again before its next run."""
        self.handle = None
        self.update()
        self._wake()

    def lose(self, reason: str) -> None:
        """The session has ended, or is somebody else's."""
        self.lost_reason = self.lost_reason or reason
        self.handle = None
        self.update()
        self._wake()

    def reserve(self, count: int, answer_bytes: int) -> int:
        """Takes the next count positions for a run, and returns the first."""
        position = self.next_position
        self.next_position = position + count
        self.num_unanswered += 1
        self.unanswered_bytes += answer_bytes
        return position

    def answered(self, position: int, column: int | TokenColumn | VectorColumn, answer_bytes: int) -> None:
        """A run of these tokens was answered; the session stands at position."""
        self.position = position
        self.num_unanswered -= 1
        self.unanswered_bytes -= answer_bytes
        if self.kept is not None:
            self.kept.add(column)
        if self.is_watched:
            self._position_told = None
            self._progress()

    def failed(self, error: CellserveError, answer_bytes: int) -> None:
        """A run was refused or withdrawn."""
        self.num_unanswered -= 1
        self.unanswered_bytes -= answer_bytes
        self.settling = True
        if isinstance(error, PositionError):
            self._position_told = error.position
        elif isinstance(error, SessionLost) and error.reason is not None:
            self.lose(error.reason)
        self._progress()

    def strand(self, run: Run) -> None:
        """The stream of a run has ended, or its server cannot go on with it."""
        self.stranded.append(run)
        self.update()
        self._wake()

    def take_stranded(self, num_runs: int) -> tuple[list[Run], list[Run]]:
        """So many of the stranded runs, which are on their way again, and the others, which will never run."""
        again, forgotten = self.stranded[:num_runs], self.stranded[num_runs:]
        self.stranded = []
        if forgotten:
            self.next_position = forgotten[0].position
            self.num_unanswered -= len(forgotten)
            self.unanswered_bytes -= sum(run.answer_bytes for run in forgotten)
        self.settling = any(run.answer.done() for run in again)
        self._progress()
        return again, forgotten

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

    def consumed(self, column: TokenColumn, position: int) -> None:
        """The session has consumed tokens of the server's own making, up to position."""
        if self.kept is not None:
            self.kept.add(column)
        self.position = self.next_position = position

    def stand_at(self, position: int) -> None:
        """The session stands at position by other means than its tokens, and nothing is on its way."""
        self.position = self.next_position = position
        if self.kept is not None:
            self.kept.restart(position)
            self.kept_limit = position + self._max_kept_tokens

    def is_durable_at(self, position: int) -> None:
        """The tokens before position are safe in the server's store."""
        self.durable_position = position
        if self.kept is not None:
            self.kept.prune(position)
            self.kept_limit = self.kept.start + self._max_kept_tokens
            self._wake()

    def has_kept_room(self, count: int) -> bool:
        """Whether so many more tokens can be kept."""
        if self.kept is not None and self.durable_position is not None:
            self.kept.prune(self.durable_position)  # which may have been told before the answers that it covers
            self.kept_limit = self.kept.start + self._max_kept_tokens
        return self.next_position + count <= self.kept_limit

    async def changes(self) -> None:
        """Waits until a run has been answered or something else has changed."""
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        self.update()
        try:
            await watcher
        finally:
            self._watchers.remove(watcher)
            self.update()

    def update(self) -> None:
        """Works out what follows from the other attributes."""
        self.ready = (
            self.handle is not None
            and not self.settling
            and not self.num_waiting
            and not self.blocked
            and not self.stranded
        )
        self.is_watched = self.settling or bool(self._watchers)

    def _progress(self) -> None:
        if self.settling and not self.num_unanswered:
            if self._position_told is not None and self._position_told != self.position:
                self.stand_at(self._position_told)
            self.next_position = self.position
            self.settling = False
            self._position_told = None
        self.update()
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)
