"""The sessions that a command means, and how it is answered for them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal
from cellserve_service.messages import CloseSessions, Command, DetachSessions, Done, ResetSessions, SessionTarget
from cellserve_service.stores.rows import LastRequest

_BUSY = Refusal(ErrorReason.ERROR_REASON_SESSION_BUSY, "a generate is under way on the session")
_FULL = Refusal(ErrorReason.ERROR_REASON_QUEUE_FULL, "too much waits for the session's runs already")


def split(command: Command, most: int) -> tuple[Command, Command | None]:
    """What one turn of the engine does of a command for many sessions, and the command for the rest of them."""
    if not isinstance(command, CloseSessions | ResetSessions | DetachSessions) or len(command.target.requests) <= most:
        return command, None
    first, rest = command.target.rows(slice(most)), command.target.rows(slice(most, None))
    return replace(command, target=first), replace(command, target=rest)


class Targets:
    """Looks up sessions of commands. What it yields can be worked on; the others it has refused."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def idle_rows(self, target: SessionTarget, *, changes: bool = False) -> Iterator[tuple[int, int]]:
        """(request, row) of the sessions meant on which no generate is under way; the others are refused.

        changes: the session is written through. Where it was this very call that changed it last, it is answered again.
        """
        core = self._core
        for request, row in self.rows(target):
            last = core.sessions.last_request.get(row)
            if changes and target.request_id and last is not None and last.request_id == target.request_id:
                self._answer_again(target, request, row, last)
            elif row in core.generations:
                core.refuse(target.stream, [request], [_BUSY])
            elif changes and (trouble := self.trouble(row)) is not None:
                core.refuse(target.stream, [request], [trouble])
            elif core.sessions.num_unfinished[row] >= core.limits.max_session_pending_tokens:
                core.refuse(target.stream, [request], [_FULL])
            else:
                yield request, row

    def _answer_again(self, target: SessionTarget, request: int, row: int, last: LastRequest) -> None:
        """Answer a repeat as the call itself was: not before what it changed is stored."""
        core = self._core
        event = done_event(target.stream, request, 0, last.epoch, last.position)
        if core.keeping is None or not core.sessions.num_writes[row]:
            core.events.append(event)
        else:
            refuse = self.refuser(target, request)
            core.when_idle(row, Operation(lambda: self.answer_when_stored(row, event), refuse=refuse))

    def rows(self, target: SessionTarget) -> Iterator[tuple[int, int]]:
        """(request, row) of the sessions meant; the others are refused.

        Each is looked up only when those before it are done: a handle that stands twice is stale the second time.
        """
        core, sessions = self._core, self._core.sessions
        for place, request in enumerate(target.requests.tolist()):
            row: int | Refusal
            if target.handles is not None:
                rows, valid = sessions.resolve_handles(target.stream, target.handles[place : place + 1])
                handle = int(target.handles[place])
                row = int(rows[0]) if valid[0] else sessions.refuse_handle(target.stream, handle)
            else:
                assert target.session_ids is not None
                row = sessions.resolve_id(target.session_ids[place])
            if isinstance(row, Refusal):
                core.refuse(target.stream, [request], [row])
            else:
                yield request, row

    def trouble(self, row: int) -> Refusal | None:
        """Why a durable session cannot be changed now."""
        keeping = self._core.keeping
        return None if keeping is None or not self._core.sessions.is_durable(row) else keeping.unavailable()

    def refuser(self, target: SessionTarget, request: int) -> Callable[[Refusal], None]:
        """What refuses the request of one session."""
        return lambda refusal: self._core.refuse(target.stream, [request], [refusal])

    def answer_when_stored(self, row: int, event: Done, *, with_marks: bool = False) -> None:
        """Give an answer once the session is stored as it is, where it is to be."""
        if self._core.keeping is None:
            self._core.events.append(event)
        else:
            self._core.keeping.write_through(row, event, with_marks=with_marks)


def done_event(stream: int, request: int, handle: int, epoch: int, position: int) -> Done:
    """That an operation on one session is done."""
    requests, handles = np.array([request], np.uint64), np.array([handle], np.uint64)
    return Done(stream, requests, handles, np.array([epoch]), np.array([position]))
