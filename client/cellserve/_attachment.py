"""Keeps one session attached to a stream, and makes calls that need it to themselves wait their turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cellserve._conversation import Conversation
from cellserve._deadline import until
from cellserve._hub import Hub
from cellserve._ledger import Ledger
from cellserve._model import ServedModel
from cellserve._outputs import OutputSpec
from cellserve._reattaching import Reattaching
from cellserve._replica import Replica
from cellserve._runs import Run
from cellserve._status import is_passing, lost_error
from cellserve._unanswered import Opened
from cellserve.errors import CellserveError, ClosedError, SessionBusy, StoreUnavailable, TimedOut

if TYPE_CHECKING:
    from cellserve._generated import BrokenOff

__all__ = ["Attachment"]

T = TypeVar("T")

_MAX_MOVING_SECONDS: Final = 10.0


class Attachment:
    """What stands between a session object and whichever stream holds the session now.

    holder: the mark of this session object, 64 bits. is_ours: whether the session was attached under it, so that it
    can be asked for when it is attached again. is_in_doubt: whether its stream was lost since it was known where
    the server stands. trouble: why the session could not be used when last tried.
    """

    def __init__(
        self, hub: Hub, model: ServedModel, session_id: str, holder: int, replica: Replica | None = None
    ) -> None:
        self.hub = hub
        self.loop = asyncio.get_running_loop()
        self.model = model
        self.holder = holder
        self.ledger = Ledger(session_id, self)
        self.conversation: Conversation | None = None
        self.is_ours = False
        self.is_in_doubt = False
        self.trouble: CellserveError | None = None
        self._replica = replica
        self._reattaching = Reattaching(self)
        self._lock = asyncio.Lock()
        self._change: asyncio.Task[Any] | None = None  # of a call that may have been cancelled
        self._ended_as: str | None = None
        self._is_generating = False
        self._broken_off: BrokenOff | None = None
        hub.attachments.add(self)

    @property
    def is_ended(self) -> bool:
        """Whether the user has closed or detached the session."""
        return self._ended_as is not None

    @property
    def needs_whole(self) -> bool:
        """Whether the server must have all tokens that were answered when the session is attached again."""
        return self._ended_as != "closed" or bool(self.ledger.stranded)

    @property
    def replica(self) -> Replica:
        """Where the session is attached, or is to be attached next."""
        ledger, replica = self.ledger, self._replica
        # Without a store that all replicas share, nobody else has the session.
        is_bound = ledger.handle is not None or ledger.durability == "none"
        if is_bound and replica is not None and not replica.transport.is_closed:
            return replica
        return self.hub.place(ledger.session_id)

    @property
    def is_misplaced(self) -> bool:
        """Whether the session is attached elsewhere than it should be by now."""
        ledger = self.ledger
        if ledger.handle is None or self.is_ended or ledger.durability == "none":
            return False
        return self._replica is not self.hub.place(ledger.session_id)

    def end(self, how: str) -> None:
        """The user closes or detaches the session: nothing new is sent, what is on its way finishes."""
        self._ended_as = how
        self.update()

    def begin_generating(self) -> None:
        """Nothing else is sent until the generate has ended."""
        self._is_generating = True
        self.update()

    def end_generating(self, broken_off: BrokenOff | None = None) -> None:
        """broken_off: how, where the server's position may be beyond the tokens received."""
        self._is_generating = False
        self._broken_off = broken_off
        self.update()

    def check(self) -> None:
        """Raises where the session cannot be used now."""
        session_id = self.ledger.session_id
        if self._ended_as is not None:
            raise ClosedError(f"session {session_id!r} was {self._ended_as} here", session_id=session_id)
        if self.hub.is_closed:
            raise ClosedError("this client was closed", session_id=session_id)
        if self.ledger.lost_reason is not None:
            raise lost_error(self.ledger.lost_reason, session_id)
        if self._is_generating:
            raise SessionBusy(
                f"session {session_id!r} is generating: iterate to the end, or break off", session_id=session_id
            )

    @contextlib.asynccontextmanager
    async def turn(self, what: str, deadline: float, *, goes_on: bool = False) -> AsyncIterator[None]:
        """Calls in a turn follow each other in the order asked, and steps asked for meanwhile wait behind them.

        goes_on: the turn is that of the generate under way, or of the call that has ended the session.
        """
        ledger = self.ledger
        ledger.num_waiting += 1
        ledger.update()
        try:
            async with until(deadline, what, ledger.session_id), self._lock:
                while self._change is not None:
                    await asyncio.wait([self._change])
                if goes_on:
                    self._is_generating = False
                else:
                    self.check()
                yield
        except TimedOut as error:
            if self.trouble is None or error.reason is not None:
                raise
            raise self.trouble_of(what, in_doubt=False) from None
        finally:
            ledger.num_waiting -= 1
            ledger.update()

    async def carry_out(
        self,
        change: Coroutine[Any, Any, T],
        what: str,
        deadline: float,
        undo: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        """Awaits a change on the server, which the server may make at any time from now on. In a turn.

        It goes on to its end, and the next turn waits for that, also where the caller is cancelled: otherwise what the
        session is asked next could overtake it. undo: takes back what only the caller would have known of.
        """

        async def bounded() -> T:
            async with until(deadline, what, self.ledger.session_id):
                return await change

        task = self._change = self.hub.carry_out(bounded())
        task.add_done_callback(self._changed)
        self.update()
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                self.hub.carry_out(_undone(task, undo))
            raise

    def replaced(self, epoch: int, position: int) -> None:
        """The server has given the session another state, which is stored before that is answered."""
        ledger = self.ledger
        ledger.epoch = epoch
        ledger.adopts_position = False
        ledger.stand_at(position)
        if ledger.kept is not None:
            ledger.is_durable_at(position)

    def begin_at(self, epoch: int, position: int, durability: str) -> None:
        """The session is new, a copy of one of this durability, and attached nowhere."""
        self._keep(durability)
        self.replaced(epoch, position)

    async def until_ready(self, spec: OutputSpec, count: int, deadline: float) -> Conversation:
        """Waits until a run of count tokens can be sent, attaching the session where it is not. In a turn."""
        ledger = self.ledger
        while True:
            self.check()
            if ledger.handle is None or ledger.stranded or self.conversation is None:
                await self._reattaching.attach(deadline)
            elif ledger.settling or not self.model.has_room(ledger, spec, count):
                await ledger.changes()
            elif self._broken_off is not None:
                if await self._broken_off.settle(self, deadline):
                    self.end_generating()
            elif not ledger.has_kept_room(count):
                self.trouble = self._store_trouble()
                await ledger.changes()
            else:
                self.trouble = None
                return self.conversation

    async def until_quiet(self, deadline: float) -> None:
        """Waits until everything sent is answered, and the server stands where the answers say. In a turn.

        A session that is attached where it should no longer be is detached there.
        """
        ledger = self.ledger
        while True:
            self.check()
            if ledger.stranded or self.is_in_doubt:
                await self._reattaching.attach(deadline)
            elif ledger.settling or ledger.num_unanswered:
                await ledger.changes()
            elif self._broken_off is not None:
                if await self._broken_off.settle(self, deadline):
                    self.end_generating()
            elif ledger.adopts_position:
                await self._reattaching.attach(deadline)
            elif self.is_misplaced:
                try:
                    await self.leave(deadline)
                except CellserveError as error:
                    if not is_passing(error):
                        raise
                    self.trouble = error  # the replica is gone: it is attached where it should be, and made whole
            else:
                self.trouble = None
                return

    async def until_answered(self, deadline: float) -> None:
        """Waits until everything sent is answered, for a session that its user has ended. In a turn."""
        ledger = self.ledger
        while ledger.num_unanswered:
            if ledger.stranded:
                await self._reattaching.attach(deadline)
            else:
                await ledger.changes()

    async def until_kept_room(self) -> None:
        """Waits, where the stream still tells of it, until fewer tokens than the bound are not safe in the store."""
        ledger = self.ledger
        while not ledger.has_kept_room(0) and ledger.handle is not None:
            self.trouble = self._store_trouble()
            await ledger.changes()

    def take(self, replica: Replica, conversation: Conversation, opened: Opened) -> None:
        """The session was opened or attached on this stream."""
        ledger = self.ledger
        self._replica = replica
        self.conversation = conversation
        self.is_ours = True
        self.is_in_doubt = conversation.is_ended
        conversation.hold(ledger, opened.handle, opened.epoch, opened.position)
        self._keep(opened.durability)
        if opened.durable_position is not None:
            ledger.is_durable_at(opened.durable_position)

    def release(self) -> int | None:
        """Lets go of the handle, and returns it; the session is attached again before its next run."""
        return self.conversation.release(self.ledger) if self.conversation is not None else None

    def stream_lost(self, trouble: CellserveError) -> None:
        """See LedgerOwner."""
        self.is_in_doubt = True
        self._reattaching.stream_lost(trouble)

    def give_up(self, run: Run) -> None:
        """See LedgerOwner. One that is stranded is settled when the session is attached again."""
        if self.conversation is not None:
            self.conversation.give_up(run)

    def client_closed(self) -> None:
        """The client has been closed: nothing is attached any more, and nobody waits any longer."""
        self._reattaching.stop()

    async def attach(self, deadline: float) -> None:
        """Attaches the session, and makes it whole, where it is not."""
        if self.ledger.handle is None or self.ledger.stranded:
            await self._reattaching.attach(deadline)

    async def leave(self, deadline: float) -> None:
        """Detaches the quiet session, so that any replica finds it as it is."""
        conversation, handle = self.conversation, self.release()
        if conversation is None or handle is None:
            return
        try:
            await conversation.send_detach(self.ledger, handle, deadline)
        except BaseException:
            self.is_in_doubt = True
            raise

    async def move(self) -> None:
        """Leaves a replica that is not the session's any more; its next step attaches it where it should be."""
        deadline = self.loop.time() + _MAX_MOVING_SECONDS
        try:
            async with self.turn("moving the session", deadline):
                await self.until_quiet(deadline)
        except CellserveError:
            return  # it has ended, or is busy, or its replica is gone: whoever uses it next learns which

    def trouble_of(self, what: str, *, in_doubt: bool) -> CellserveError:
        """What to raise for a call whose timeout has passed."""
        return self._reattaching.late_error(what, in_doubt=in_doubt)

    def update(self) -> None:
        """Works out whether steps may be sent."""
        self.ledger.blocked = (
            self.is_ended
            or self._is_generating
            or self._broken_off is not None
            or self._change is not None
            or self._reattaching.is_making_whole
        )
        self.ledger.update()

    def _changed(self, _: asyncio.Task[Any]) -> None:
        self._change = None
        self.update()

    def _keep(self, durability: str) -> None:
        model = self.model
        self.ledger.keep(durability, model.max_kept_tokens, vectors=model.info.vocab_size is None)

    def _store_trouble(self) -> CellserveError:
        num_tokens, session_id = self.model.max_kept_tokens, self.ledger.session_id
        return StoreUnavailable(f"{num_tokens} tokens of session {session_id!r} are not yet safe in the server's store")


async def _undone(task: asyncio.Task[T], undo: Callable[[T], Awaitable[object]]) -> None:
    with contextlib.suppress(CellserveError):
        await undo(await task)
