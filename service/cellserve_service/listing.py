"""Tells how sessions stand: one, or a page of all."""

import heapq
import itertools
from collections.abc import Sequence

from cellserve_service.adoption import read_stored, stored_marks
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.messages import GetSession, ListSessions, SessionFacts, SessionsListed, Tier
from cellserve_service.sessions import NO_SLOT, NO_STREAM
from cellserve_service.stores.operations import Listed, ListRows, Outcome, Row
from cellserve_service.stores.rows import StoredSession
from cellserve_service.targets import Targets


class Listing:
    """Tells how sessions stand."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._targets = Targets(core)

    def get(self, command: GetSession) -> None:
        for request, row in self._targets.rows(command.target):
            listed = SessionsListed(command.target.stream, request, [_facts(self._core, row)], 1, more=False)
            self._core.events.append(listed)

    def list_page(self, command: ListSessions) -> None:
        keeping = self._core.keeping
        if keeping is None:
            self._list(command, [], 0)
            return

        def done(outcomes: Sequence[Outcome]) -> None:
            listed = outcomes[0]
            assert isinstance(listed, Listed)
            self._list(command, listed.rows, listed.total)

        def failed(refusal: Refusal) -> None:
            self._core.refuse(command.stream, [command.request], [refusal])

        keeping.ask([ListRows(command.model, command.after, command.page_size + 1)], done, failed)

    def _list(self, command: ListSessions, stored: Sequence[tuple[Row, int]], num_stored: int) -> None:
        """A page of what is here and what is stored; every durable session is stored, wherever it is."""
        core, row_by_id = self._core, self._core.sessions.row_by_id
        here = [
            session_id
            for session_id, row in row_by_id.items()
            if (core.keeping is None or not core.sessions.is_durable(row))
            and (not command.model or core.model_of(row).info.name == command.model)
        ]
        stored_by_id = {row.session_id: (row, epoch) for row, epoch in stored}
        ids = itertools.chain((session_id for session_id in here if session_id > command.after), stored_by_id)
        following = heapq.nsmallest(command.page_size + 1, ids)
        facts = [
            _facts(core, row_by_id[session_id])
            if session_id in row_by_id
            else stored_facts(core, *stored_by_id[session_id], read_stored(core, stored_by_id[session_id][0]))
            for session_id in following[: command.page_size]
        ]
        more = len(following) > len(facts)
        total = len(here) + num_stored
        core.events.append(SessionsListed(command.stream, command.request, facts, total, more=more))


def _facts(core: Core, row: int) -> SessionFacts:
    sessions = core.sessions
    info = core.model_of(row).info
    session_id = sessions.ids[row]
    assert session_id is not None
    tier = Tier.DEVICE if sessions.slot[row] != NO_SLOT else Tier.HOST
    return SessionFacts(
        session_id=session_id,
        model=info.name,
        model_version=info.version,
        position=int(sessions.position[row]),
        epoch=int(sessions.epoch[row]),
        num_pending_tokens=int(sessions.num_pending_tokens[row]),
        durability=int(sessions.durability[row]),  # type: ignore[arg-type]
        durable_position=int(sessions.durable_position[row]) if sessions.is_durable(row) else None,
        tier=Tier.STORE if sessions.is_in_store[row] else tier,
        attached=int(sessions.owner[row]) != NO_STREAM,
        generating=bool(sessions.is_generating[row]),
        idle_seconds=core.now - float(sessions.last_used[row]),
        age_seconds=core.now - float(sessions.created_at[row]),
        marks=[(name, position) for name, (position, _) in sessions.marks.get(row, {}).items()],
    )


def stored_facts(core: Core, row: Row, epoch: int, read: StoredSession | Refusal) -> SessionFacts:
    """The same of a session that is only in the store; less of one whose row cannot be read."""
    now = core.now + core.wall_offset
    served = core.model_named(row.model)
    known = None if isinstance(read, Refusal) else read
    return SessionFacts(
        session_id=row.session_id,
        model=row.model,
        model_version=0 if served is None else served.info.version,
        position=row.position,
        epoch=epoch,
        num_pending_tokens=0,
        durability=2 if known is None else known.durability,  # type: ignore[arg-type]
        durable_position=row.position,
        tier=Tier.STORE,
        attached=False,
        generating=False,
        idle_seconds=max(0.0, now - (row.expires_at - core.limits.idle_timeout_seconds)),
        age_seconds=0.0 if known is None else max(0.0, now - known.created_at),
        marks=[] if known is None else stored_marks(row, known),
    )
