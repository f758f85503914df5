"""Brings stored sessions back for calls that name them by id, while those calls wait.

What changes a session claims it; what only looks at one reads its row, and leaves it where it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service import messages
from cellserve_service.adoption import adopt, ended_refusal, read_stored
from cellserve_service.closing import Closing
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.forking import Forking
from cellserve_service.generation import no_more_runs
from cellserve_service.keeping import Keeping
from cellserve_service.listing import stored_facts
from cellserve_service.messages import (
    Command,
    ExportSession,
    ForkSession,
    GetSession,
    InitialState,
    SessionsListed,
    SessionTarget,
    StateExported,
)
from cellserve_service.new_sessions import session_limit
from cellserve_service.room import Room
from cellserve_service.store_requests import MOVED
from cellserve_service.stores.operations import (
    Claim,
    Claimed,
    ClaimMode,
    ClaimResult,
    Ended,
    Load,
    Loaded,
    Outcome,
    Row,
)
from cellserve_service.stores.rows import StoredSession
from cellserve_service.targets import done_event

_CANCELLED = Refusal(ErrorReason.ERROR_REASON_RUN_CANCELLED, "the caller withdrew it")
# What is stored, and cannot be served, can still be closed.
_UNREADABLE = {
    ErrorReason.ERROR_REASON_STATE_DAMAGED,
    ErrorReason.ERROR_REASON_STATE_MISMATCH,
    ErrorReason.ERROR_REASON_MODEL_NOT_FOUND,
}
_READERS = GetSession | ExportSession | ForkSession


class Recalling:
    """Commands that wait for the state store to tell of their session."""

    def __init__(
        self,
        core: Core,
        keeping: Keeping,
        closing: Closing,
        forking: Forking,
        room: Room,
        handle: Callable[[Command], None],
    ) -> None:
        self._core = core
        self._keeping = keeping
        self._closing = closing
        self._forking = forking
        self._room = room
        self._handle = handle
        self._waiting: dict[tuple[int, int], bool] = {}  # by stream and request: whether it was cancelled

    def recall(self, command: Command) -> bool:
        """Whether a command must wait for its session, which is not here; it is handled when that is."""
        found = _named(command)
        if found is None:
            return False
        stream, request, session_id = found
        core, keeping = self._core, self._keeping
        if session_id in core.sessions.row_by_id:
            return False
        if core.is_draining and isinstance(command, messages.SubmitRuns | messages.SubmitGenerate):
            core.refuse(stream, [request], [no_more_runs()])  # and the session stays where it is
            return True
        self._waiting[stream, request] = False
        if session_id in core.closing:
            core.closing[session_id].append(lambda: self._again(command, stream, request))
            return True
        if isinstance(command, _READERS):
            operation: Claim | Load = Load(session_id)
        else:
            operation = Claim(session_id, None, ClaimMode.ATTACH)

        def done(outcomes: Sequence[Outcome]) -> None:
            keeping.end_claims(claimed)
            outcome = outcomes[0]
            row = core.sessions.row_by_id.get(session_id)
            if row is not None and isinstance(outcome, Claimed) and outcome.result is ClaimResult.TAKEN:
                keeping.lose(row, MOVED)  # what came here meanwhile was another server's again by then
                row = None
            if self._was_cancelled(command, stream, request):
                core.refuse(stream, [request], [_CANCELLED])
            elif row is not None:
                self._handle(command)
            elif session_id in keeping.ending:
                self.recall(command)
            elif isinstance(outcome, Loaded):
                self._take_loaded(command, stream, request, session_id, outcome)
            else:
                assert isinstance(outcome, Claimed)
                self._take_claimed(command, stream, request, session_id, outcome)

        def failed(refusal: Refusal) -> None:
            keeping.end_claims(claimed)
            del self._waiting[stream, request]
            local = self._core.sessions.resolve_id(session_id)
            # A session that is not durable is known here alone, so what is known here of its end is true.
            known = isinstance(local, Refusal) and local.reason != ErrorReason.ERROR_REASON_SESSION_NOT_FOUND
            self._core.refuse(stream, [request], [local if known and isinstance(local, Refusal) else refusal])

        claimed = [session_id] if isinstance(operation, Claim) else []
        keeping.begin_claims(claimed)
        keeping.ask([operation], done, failed)
        return True

    def _again(self, command: Command, stream: int, request: int) -> None:
        """The session of that id has ended meanwhile."""
        if self._was_cancelled(command, stream, request):
            self._core.refuse(stream, [request], [_CANCELLED])
        elif not self.recall(command):
            self._handle(command)

    def _was_cancelled(self, command: Command, stream: int, request: int) -> bool:
        """A call with a request id goes on when its caller goes away: a repeat may be on its way already."""
        target = getattr(command, "target", None)
        return self._waiting.pop((stream, request)) and not getattr(target, "request_id", "")

    def cancel(self, stream: int, requests: set[int] | None) -> None:
        """The callers of some requests, or all of a stream, want them no more."""
        for key in self._waiting:
            if key[0] == stream and (requests is None or key[1] in requests):
                self._waiting[key] = True

    def _take_claimed(self, command: Command, stream: int, request: int, session_id: str, claimed: Claimed) -> None:
        core = self._core
        if claimed.row is not None and claimed.result in (ClaimResult.TAKEN, ClaimResult.KEPT):
            row: int | Refusal = session_limit(core)
            if self._room.make(1):
                row = adopt(core, claimed.row, claimed.epoch)
            if not isinstance(row, Refusal):
                self._handle(command)
            elif isinstance(command, messages.CloseSessions) and row.reason in _UNREADABLE:
                self._closing.close_stored(command, request, claimed.row)
            else:
                core.refuse(stream, [request], [row])
            return
        self._refuse_missing(command, stream, request, session_id, claimed.ended)

    def _take_loaded(self, command: Command, stream: int, request: int, session_id: str, loaded: Loaded) -> None:
        core, row = self._core, loaded.row
        if row is None:
            self._refuse_missing(command, stream, request, session_id, loaded.ended)
            return
        read = read_stored(core, row)
        if isinstance(read, Refusal):
            core.refuse(stream, [request], [read])
        else:
            assert isinstance(command, _READERS)
            self._answer_from_store(command, request, row, loaded.epoch, read)

    def _answer_from_store(
        self, command: GetSession | ExportSession | ForkSession, request: int, row: Row, epoch: int, read: StoredSession
    ) -> None:
        """Answer what only looks at a session out of its row, which may be another server's."""
        core, stream = self._core, command.target.stream
        match command:
            case GetSession():
                facts = [stored_facts(core, row, epoch, read)]
                core.events.append(SessionsListed(stream, request, facts, 1, more=False))
            case ExportSession():
                state = InitialState(read.fingerprint, read.position, read.state())
                core.events.append(StateExported(stream, request, state))
            case ForkSession():
                served = core.model_named(row.model)
                assert served is not None
                self._forking.fork_from(command, request, served, read.durability, read.position, read.state())

    def _refuse_missing(
        self, command: Command, stream: int, request: int, session_id: str, ended: Ended | None
    ) -> None:
        core = self._core
        refusal = core.sessions.resolve_id(session_id) if ended is None else ended_refusal(session_id, ended)
        assert isinstance(refusal, Refusal)
        if isinstance(command, messages.CloseSessions) and ended is not None:
            asked = command.target.request_id
            if asked and asked == ended.request_id:
                core.events.append(done_event(stream, request, 0, 0, ended.position))
                return
        core.refuse(stream, [request], [refusal])


def _named(command: Any) -> tuple[int, int, str] | None:
    """Stream, request and session id of a command that names one session by its id."""
    if isinstance(command, messages.SubmitGenerate):
        return command.stream, command.request, command.session_id
    # Only unary calls name sessions by ids, one each.
    if isinstance(command, messages.SubmitRuns):
        if command.session_ids is None:
            return None
        return int(command.streams[0]), int(command.requests[0]), command.session_ids[0]
    target: SessionTarget | None = getattr(command, "target", None)
    if target is None or target.session_ids is None:
        return None
    return target.stream, int(target.requests[0]), target.session_ids[0]
