"""Attaches one session again after its stream was lost, and makes it whole, for as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Final

from cellserve._backoff import Backoff
from cellserve._conversation import Conversation
from cellserve._deadline import Timeout
from cellserve._ledger import Ledger
from cellserve._outbox import OpenKey
from cellserve._resume import UnansweredRun, plan_resume
from cellserve._runs import Run, fail_run
from cellserve._status import TOKENS_LOST, is_passing, make_error
from cellserve.errors import (
    CellserveError,
    ClosedError,
    ConnectionLost,
    MessageTooLarge,
    PositionGap,
    ResourceExhausted,
    SessionBusy,
    SessionLost,
    SessionMoved,
    StaleHandle,
    TimedOut,
    Unavailable,
)
from cellserve.v1.stream_pb2 import Durability, OpenMode

if TYPE_CHECKING:
    from cellserve._attachment import Attachment

__all__ = ["Reattaching"]

# For replayed tokens, which nobody waits for but the task that sends them.
_PATIENT: Final = Timeout(86400.0)
_NEVER: Final = float("inf")


class Reattaching:
    """One task at a time, which waits for a connection, attaches, replays and sends again.

    is_making_whole: whether the session is attached, and not yet where its callers left it.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.is_making_whole = False
        self._attachment = attachment
        self._ledger = attachment.ledger
        self._loop = attachment.loop
        self._task: asyncio.Task[None] | None = None
        self._wanted_until: float | None = None  # by a call in its turn
        self._was_stale = False

    def stream_lost(self, trouble: CellserveError) -> None:
        """The handle is of no use any more; the runs that were on their way may be stranded."""
        self._was_stale = isinstance(trouble, StaleHandle)
        self._attachment.trouble = None if self._was_stale else trouble
        if self._attachment.hub.is_closed:
            self._fail(ClosedError("the client was closed while the call was under way"))
        elif any(not run.answer.done() for run in self._ledger.stranded):
            self._begin()

    async def attach(self, deadline: float) -> None:
        """Waits until the session is attached and whole. In a turn, which ends this by its timeout."""
        self._wanted_until = deadline
        try:
            task = self._begin()
            await asyncio.wait([task])
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        finally:
            self._wanted_until = None
        if self._attachment.hub.is_closed:
            raise ClosedError("this client was closed", session_id=self._ledger.session_id)

    def stop(self) -> None:
        """The client has been closed."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._fail(ClosedError("the client was closed while the call was under way"))

    def late_error(self, what: str, *, in_doubt: bool) -> CellserveError:
        """The exception for a call whose timeout has passed."""
        trouble, session_id = self._attachment.trouble, self._ledger.session_id
        if trouble is None:
            return TimedOut(f"{what} was not answered within its timeout", session_id=session_id)
        if isinstance(trouble, ConnectionLost) or trouble.reason is None:
            message = f"{what} was not answered within its timeout: {trouble}"
            return ConnectionLost(message, in_doubt=in_doubt, session_id=session_id)
        return make_error(trouble.reason, trouble.code, str(trouble), session_id=session_id)

    def _begin(self) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._attach_while_wanted())
            self._task.add_done_callback(_see_exception)
        return self._task

    async def _attach_while_wanted(self) -> None:
        backoff = Backoff()
        while (deadline := self._next_deadline()) is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    if await self._attach(deadline):
                        return
            except TimeoutError:
                continue
            except CellserveError as error:
                if not _can_retry(error):
                    raise self._fail(error) from None
                self._attachment.trouble = error
                pause_seconds = max(backoff.next_seconds(), error.retry_after_seconds or 0.0)
                await asyncio.sleep(min(pause_seconds, max(0.0, deadline - self._loop.time())))

    async def _attach(self, deadline: float) -> bool:
        """Whether the session is attached and whole: it may be lost again at any time."""
        attachment, ledger = self._attachment, self._ledger
        while ledger.num_unanswered > len(ledger.stranded):
            await ledger.changes()  # what the old handle was used for is answered before it is replaced
        attachment.release()
        await attachment.hub.begin()
        replica = attachment.replica
        connection = await replica.connect(attachment.model.limits)
        conversation = connection.conversation
        key = OpenKey(
            model=attachment.model.info.name,
            mode=OpenMode.OPEN_MODE_RESUME if attachment.is_ours else OpenMode.OPEN_MODE_ATTACH,
            durability=Durability.DURABILITY_UNSPECIFIED,
            has_states=False,
        )
        opened = await conversation.send_open(key, ledger.session_id, attachment.holder, None, deadline)
        self.is_making_whole = True
        attachment.update()
        try:
            attachment.take(replica, conversation, opened)
            if attachment.needs_whole:
                await self._make_whole(conversation, opened.handle, opened.position)
        except BaseException:
            attachment.release()
            attachment.is_in_doubt = True
            raise
        finally:
            self.is_making_whole = False
            attachment.update()
        attachment.trouble = None
        self._was_stale = False
        return ledger.handle is not None and not ledger.stranded

    async def _make_whole(self, conversation: Conversation, handle: int, position: int) -> None:
        ledger = self._ledger
        ledger.stranded.sort(key=lambda run: run.position)
        kept_start = None if ledger.kept is None else ledger.kept.start
        confirmed = ledger.position
        runs = [_facts(run) for run in ledger.stranded]
        plan = plan_resume(position, confirmed, kept_start, runs, ledger.session_id)
        if plan.replays:
            await self._replay(conversation, handle, position, confirmed)
        self._check_attached(handle)
        # A run may have been given up during the replay.
        plan = plan_resume(
            max(position, confirmed), confirmed, kept_start, [_facts(run) for run in ledger.stranded], ""
        )
        again, forgotten = ledger.take_stranded(plan.num_runs)
        for run in again:
            conversation.send_again(run, handle)
        for run in forgotten:
            if not run.answer.done():
                run.answer.set_exception(
                    PositionGap(
                        "a step before this one was given up and has not run",
                        position=forgotten[0].position,
                        session_id=ledger.session_id,
                    )
                )

    async def _replay(self, conversation: Conversation, handle: int, begin: int, end: int) -> None:
        """Runs the kept tokens from position begin to position end once more."""
        ledger, model = self._ledger, self._attachment.model
        assert ledger.kept is not None
        # Positions of its own: those of the session are where its answers have brought them.
        scratch = Ledger(ledger.session_id)
        scratch.attach(handle, ledger.epoch, begin)
        while begin < end:
            count = min(model.max_run_tokens(model.no_outputs), end - begin)
            self._check_attached(handle)
            column = ledger.kept.cut(begin, begin + count)
            run = conversation.send_run(scratch, handle, model.no_outputs, column, count, _PATIENT, _NEVER)
            begin += count
            await run.answer

    def _check_attached(self, handle: int) -> None:
        if self._ledger.handle != handle:
            raise ConnectionLost("the stream to the server ended again", session_id=self._ledger.session_id)

    def _next_deadline(self) -> float | None:
        """When the next who waits has waited too long; None where nobody waits. Fails those who have."""
        now, deadline = self._loop.time(), _NEVER
        for run in self._ledger.stranded:
            if run.answer.done():
                continue
            if run.deadline <= now:
                self._time_out(run)
            else:
                deadline = min(deadline, run.deadline)
        if self._wanted_until is not None and self._wanted_until > now:
            deadline = min(deadline, self._wanted_until)
        return None if deadline == _NEVER else deadline

    def _time_out(self, run: Run) -> None:
        error = self.late_error("the step", in_doubt=run.was_sent)
        # Who is told that the server cannot be had will repeat the step, and who is told of a timeout goes on.
        run.will_be_repeated = isinstance(error, Unavailable)
        run.answer.set_exception(error)
        self._ledger.give_up()

    def _fail(self, error: CellserveError) -> CellserveError:
        """Fails the stranded runs for good; returns the error as the session's user should see it."""
        ledger = self._ledger
        if isinstance(error, SessionMoved) and self._was_stale:
            # Somebody's reset or import, which has taken our mark away.
            error = StaleHandle(str(error), session_id=ledger.session_id)
        if isinstance(error, SessionLost):
            ledger.lose(error.reason or TOKENS_LOST)
        runs, ledger.stranded = ledger.stranded, []
        for run in runs:
            fail_run(run, copy.copy(error))
        return error


def _can_retry(error: CellserveError) -> bool:
    is_full = isinstance(error, ResourceExhausted) and not isinstance(error, MessageTooLarge)
    return is_full or is_passing(error) or isinstance(error, StaleHandle | SessionBusy)


def _facts(run: Run) -> UnansweredRun:
    return UnansweredRun(
        begin=run.position,
        end=run.position + run.count,
        is_waited_for=not run.answer.done(),
        will_be_repeated=run.will_be_repeated,
    )


def _see_exception(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # those who wait have been told
