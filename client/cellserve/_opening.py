"""Opens sessions: places them, and repeats what a broken connection has left open."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cellserve._attachment import Attachment
from cellserve._backoff import retried
from cellserve._conversation import Conversation
from cellserve._hub import Hub, close_quietly
from cellserve._identity import make_holder, make_id
from cellserve._model import ServedModel
from cellserve._outbox import OpenKey
from cellserve._replica import Replica
from cellserve._session import AsyncSession
from cellserve._status import is_passing
from cellserve._unanswered import Opened
from cellserve.errors import CellserveError, ConnectionLost, Draining, NotFound, SessionLost, TimedOut
from cellserve.v1.stream_pb2 import Durability, OpenMode

__all__ = ["DurabilityName", "OpenModeName", "open_all"]

OpenModeName: TypeAlias = Literal["attach", "create", "attach_or_create"]
DurabilityName: TypeAlias = Literal["none", "periodic", "sync"]

_OPEN_MODES: Final = {
    "attach": OpenMode.OPEN_MODE_ATTACH,
    "create": OpenMode.OPEN_MODE_CREATE,
    "attach_or_create": OpenMode.OPEN_MODE_ATTACH_OR_CREATE,
}
_DURABILITIES: Final = {
    None: Durability.DURABILITY_UNSPECIFIED,
    "none": Durability.DURABILITY_NONE,
    "periodic": Durability.DURABILITY_PERIODIC,
    "sync": Durability.DURABILITY_SYNC,
}


async def open_all(
    hub: Hub,
    model: str,
    count_or_ids: int | Sequence[str],
    states: Sequence[bytes] | None,
    *,
    mode: OpenModeName,
    keep: bool,
    durability: DurabilityName | None,
    deadline: float,
) -> list[AsyncSession]:
    """Opens so many new sessions, or one for each id, in this order; all or none. See AsyncClient.open_sessions."""
    if mode not in _OPEN_MODES:
        raise ValueError(f"mode is one of {', '.join(_OPEN_MODES)}, not {mode!r}")
    if durability not in _DURABILITIES:
        raise ValueError(f"durability is one of none, periodic, sync, not {durability!r}")
    is_new = isinstance(count_or_ids, int)
    if is_new and mode == "attach":
        raise ValueError("to attach a session takes its id")
    ids = [make_id() for _ in range(count_or_ids)] if isinstance(count_or_ids, int) else count_or_ids
    served = await hub.look_up(model, deadline)
    key = OpenKey(
        model=model,
        mode=OpenMode.OPEN_MODE_CREATE if is_new else _OPEN_MODES[mode],
        durability=_DURABILITIES[durability],
        has_states=states is not None,
    )
    openings = [
        _Opening(one, make_holder(), None if states is None else states[index], is_new) for index, one in enumerate(ids)
    ]
    opener = _Opener(hub, served, key, openings, keep, deadline)
    opening = hub.carry_out(retried(opener.open_the_rest, deadline))
    try:
        await asyncio.shield(opening)
    except asyncio.CancelledError:
        # Whether what was sent has opened a session is known when it is answered. Under an id of the caller's it may
        # be opened again by then, so it is not closed.
        hub.carry_out(opener.undo(opening, closes=is_new))
        raise
    except BaseException:
        await asyncio.shield(hub.carry_out(opener.undo(opening, closes=True)))
        raise
    return [opener.sessions[opening.session_id] for opening in openings]


@dataclass(slots=True, eq=False)
class _Opening:
    """One session to open. is_in_doubt: whether an open that was sent before may have taken effect."""

    session_id: str
    holder: int
    state: bytes | None
    is_new: bool
    is_in_doubt: bool = False


class _Opener:
    """The opens of one call. sessions: those that are open, by id.

    Once they are to be undone, nothing new is opened; what may have been is taken up, so that it can be left again.
    """

    def __init__(
        self, hub: Hub, served: ServedModel, key: OpenKey, openings: Sequence[_Opening], keep: bool, deadline: float
    ) -> None:
        self.sessions: dict[str, AsyncSession] = {}
        self._hub = hub
        self._served = served
        self._key = key
        self._resume_key = OpenKey(key.model, OpenMode.OPEN_MODE_RESUME, Durability.DURABILITY_UNSPECIFIED, False)
        self._openings = openings
        self._keep = keep
        self._deadline = deadline
        self._is_wanted = True

    async def open_the_rest(self, _: float) -> None:
        """Opens what is not open yet. Raises when all have been answered: what does not pass rather than what does."""
        await self._hub.begin()
        rest = [opening for opening in self._openings if opening.session_id not in self.sessions]
        in_doubt = [opening for opening in rest if opening.is_in_doubt]
        failures = await self._send(self._resume_key, in_doubt) if in_doubt else []
        if self._is_wanted:
            failures += await self._send(self._key, [opening for opening in rest if not opening.is_in_doubt])
        for failure in failures:
            if not is_passing(failure):
                raise failure
        if failures:
            raise failures[0]

    async def undo(self, opening: asyncio.Task[None], *, closes: bool) -> None:
        """Leaves the sessions, when all answers have come. closes: those that were created."""
        self._is_wanted = False
        await asyncio.wait([opening])
        await asyncio.gather(
            *(
                close_quietly(session) if closes and session.created else session.detach()
                for session in self.sessions.values()
            )
        )

    async def _send(self, key: OpenKey, openings: Sequence[_Opening]) -> list[CellserveError]:
        replicas = [self._hub.place(opening.session_id) for opening in openings]
        connections = {replica: await replica.connect(self._served.limits) for replica in set(replicas)}
        if not self._is_wanted and key is self._key:
            return []
        answers = [
            connections[replica].conversation.send_open(
                key,
                opening.session_id,
                opening.holder,
                opening.state if key.has_states else None,
                self._deadline,
                is_new=opening.is_new,
            )
            for opening, replica in zip(openings, replicas, strict=True)
        ]
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        failures: list[CellserveError] = []
        for opening, replica, outcome in zip(openings, replicas, outcomes, strict=True):
            if isinstance(outcome, Opened):
                self._take(opening, replica, connections[replica].conversation, outcome)
            elif opening.is_in_doubt and isinstance(outcome, NotFound | SessionLost):
                opening.is_in_doubt = False  # it has not taken effect, or is somebody else's by now: as if never sent
                failures.append(ConnectionLost("the open was lost", session_id=opening.session_id))
            elif isinstance(outcome, TimedOut) and not replica.is_up:
                failures.append(_nobody_answers(replica, opening.session_id))
            elif isinstance(outcome, CellserveError):
                opening.is_in_doubt |= isinstance(outcome, ConnectionLost) and outcome.in_doubt
                failures.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return failures

    def _take(self, opening: _Opening, replica: Replica, conversation: Conversation, opened: Opened) -> None:
        created = opened.created
        if opening.is_in_doubt and self._key.mode != OpenMode.OPEN_MODE_ATTACH:
            # Taken up under its mark: it is as the open that was in doubt has left it.
            created = self._key.mode == OpenMode.OPEN_MODE_CREATE or self._key.has_states or opened.position == 0
        attachment = Attachment(self._hub, self._served, opened.session_id, opening.holder)
        attachment.take(replica, conversation, opened)
        self.sessions[opened.session_id] = AsyncSession(attachment, keep=self._keep, created=created)


def _nobody_answers(replica: Replica, session_id: str) -> CellserveError:
    if replica.is_draining:
        return Draining(f"the server at {replica.target} is draining and opens no sessions", session_id=session_id)
    return ConnectionLost(f"nobody answers at {replica.target}", session_id=session_id)
