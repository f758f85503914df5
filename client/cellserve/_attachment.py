"""Keeps one session attached to the client's stream, and makes calls that need it to themselves wait their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from cellserve._conversation import Conversation
from cellserve._deadline import until
from cellserve._hub import Hub
from cellserve._ledger import Ledger
from cellserve._model import ServedModel
from cellserve._outbox import OpenKey
from cellserve._status import lost_error
from cellserve._unanswered import Opened
from cellserve.errors import ClosedError, ConnectionLost, SessionBusy, SessionLost
from cellserve.v1.session_service_pb2 import ExportSessionRequest
from cellserve.v1.stream_pb2 import Durability, OpenMode

__all__ = ["Attachment"]

_ATTACH_PAUSES_SECONDS: Final = (0.02, 0.2)
_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.05


class Attachment:
    """What stands between a session object and whichever stream holds the session now."""

    def __init__(self, hub: Hub, model: ServedModel, session_id: str) -> None:
        self.hub = hub
        self.loop = asyncio.get_running_loop()
        self.model = model
        self.ledger = Ledger(session_id)
        self.conversation: Conversation | None = None
        self._lock = asyncio.Lock()
        self._ended_as: str | None = None
        self._is_generating = False
        self._position_is_moving = False

    @property
    def is_ended(self) -> bool:
        """Whether the user has closed or detached the session."""
        return self._ended_as is not None

    def end(self, how: str) -> None:
        """The user closes or detaches the session: nothing new is sent, what is on its way finishes."""
        self._ended_as = how
        self._update()

    def begin_generating(self) -> None:
        """Nothing else is sent until the generate has ended."""
        self._is_generating = True
        self._update()

    def end_generating(self, *, position_is_moving: bool) -> None:
        """position_is_moving: it was broken off, and the server's position may be beyond the tokens received."""
        self._is_generating = False
        self._position_is_moving = position_is_moving
        self._update()

    def check(self) -> None:
        """Raises where the session cannot be used now."""
        session_id = self.ledger.session_id
        if self._ended_as is not None:
            raise ClosedError(f"session {session_id!r} was {self._ended_as} here", session_id=session_id)
        if self.ledger.lost_reason is not None:
            raise lost_error(self.ledger.lost_reason, session_id)
        if self._is_generating:
            raise SessionBusy(
                f"session {session_id!r} is generating: iterate to the end, or break off", session_id=session_id
            )

    @asynccontextmanager
    async def turn(self, what: str, deadline: float) -> AsyncIterator[None]:
        """Calls in a turn follow each other in the order asked, and steps asked for meanwhile wait behind them."""
        ledger = self.ledger
        ledger.num_waiting += 1
        ledger.update()
        try:
            async with until(deadline, what, ledger.session_id), self._lock:
                self.check()
                yield
        finally:
            ledger.num_waiting -= 1
            ledger.update()

    async def until_ready(self, count: int, deadline: float) -> Conversation:
        """Waits until a run of count tokens can be sent, attaching the session where it is not. In a turn."""
        ledger = self.ledger
        while True:
            self.check()
            num_pending = ledger.next_position - ledger.position
            if ledger.settling or (ledger.num_unanswered and num_pending + count > self.model.max_pending_tokens):
                await ledger.changes()
            elif self._position_is_moving:
                await self._learn_position(deadline)
            elif ledger.handle is None or self.conversation is None:
                await self._attach(deadline)
            else:
                return self.conversation

    async def until_quiet(self, deadline: float) -> None:
        """Waits until everything sent is answered and the position is known. In a turn."""
        ledger = self.ledger
        while True:
            self.check()
            if ledger.settling or ledger.num_unanswered:
                await ledger.changes()
            elif self._position_is_moving:
                await self._learn_position(deadline)
            elif ledger.adopts_position:
                await self._attach(deadline)
            else:
                return

    def take(self, conversation: Conversation, opened: Opened) -> None:
        """The session was opened or attached on this stream."""
        self.conversation = conversation
        self.ledger.durable_position = opened.durable_position
        conversation.hold(self.ledger, opened.handle, opened.epoch, opened.position)

    def release(self) -> int | None:
        """Lets go of the handle, and returns it; the session is attached again before its next run."""
        return self.conversation.release(self.ledger) if self.conversation is not None else None

    async def _attach(self, deadline: float) -> None:
        # Where a connection has just broken, the first new stream may still begin on it. To attach twice is harmless.
        for pause_seconds in (*_ATTACH_PAUSES_SECONDS, None):
            try:
                await self._attach_once(deadline)
                return
            except ConnectionLost:
                if pause_seconds is None:
                    raise
                await asyncio.sleep(pause_seconds)

    async def _attach_once(self, deadline: float) -> None:
        conversation = self.hub.connect(self.model.limits).conversation
        key = OpenKey(
            model=self.model.info.name,
            mode=OpenMode.OPEN_MODE_ATTACH,
            durability=Durability.DURABILITY_UNSPECIFIED,
            has_ids=True,
            has_states=False,
        )
        try:
            opened = await conversation.send_open(key, self.ledger.session_id, None, deadline)
        except SessionLost as error:
            if error.reason is not None:
                self.ledger.lose(error.reason)
            raise
        self.take(conversation, opened)

    async def _learn_position(self, deadline: float) -> None:
        # An export waits for what the server has accepted, and tells by SESSION_BUSY that the generate still
        # runs.
        transport, pause_seconds = self.hub.transport, _FIRST_PAUSE_SECONDS
        request = ExportSessionRequest(session_id=self.ledger.session_id)
        while True:
            seconds_left = deadline - self.loop.time()
            try:
                response = await transport.call(
                    transport.sessions.ExportSession, request, max(seconds_left, 0.001), self.ledger.session_id
                )
            except SessionBusy:
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            else:
                self.ledger.move_to(response.state.position)
                self._position_is_moving = False
                self._update()
                return

    def _update(self) -> None:
        self.ledger.blocked = self.is_ended or self._is_generating or self._position_is_moving
        self.ledger.update()
