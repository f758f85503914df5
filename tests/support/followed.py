"""Sessions beside references that are given what they have consumed, undisturbed; and what is left over of clients."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cellserve import AsyncClient, AsyncSession
from tests.support.interrupting import Interrupted
from tests.support.metrics import Metrics
from tests.support.replicas import MODEL
from tests.support.server import ServerProcess

__all__ = [
    "MAX_RUN_TOKENS",
    "SETTINGS",
    "FollowedSession",
    "Outcomes",
    "assert_nothing_is_left",
    "consuming",
    "nothing",
    "other_tasks",
    "until_open",
]

MAX_RUN_TOKENS: Final = 128
# What an answer takes for each token: a state of two layers, and the next token.
_ANSWER_BYTES: Final = 2 * 8 * 4 + 4
# Of a server that holds the answer of so many tokens at most, and gives that of 32 in a slice.
SETTINGS: Final[Mapping[str, str | int | float | bool]] = {
    "deterministic": True,
    "checkpoint_interval_seconds": 0.1,
    "max_held_answer_bytes": MAX_RUN_TOKENS * _ANSWER_BYTES,
    "max_answer_bytes": 32 * _ANSWER_BYTES,
}
_TAIL: Final = [5, 0, 7]
_PATIENCE_SECONDS: Final = 8.0

# What the reference must meet with, by the position at which the session stands then.
Outcomes = Mapping[int, Callable[[AsyncSession], Awaitable[object]]]


async def nothing(_: AsyncSession) -> None:
    """The call has had no effect."""


def consuming(tokens: Sequence[int]) -> Callable[[AsyncSession], Awaitable[object]]:
    """The session has consumed these."""
    return lambda reference: reference.step(list(tokens), at="none")


@dataclass
class FollowedSession:
    """A session, and one of another client in the same server that serves as its reference."""

    session: AsyncSession
    reference: AsyncSession

    @classmethod
    async def open(cls, client: AsyncClient, other: AsyncClient, **more: Any) -> FollowedSession:
        """A session with a state, and a mark two tokens before it."""
        followed = cls(await client.open_session(MODEL, **more), await other.open_session(MODEL, durability="none"))
        for session in (followed.session, followed.reference):
            await session.step([1, 2], at="none")
            await session.checkpoint("marked")
            await session.step([3, 4], at="none")
        return followed

    async def check(self, outcomes: Outcomes) -> int:
        """The session goes on from one of these positions, with the reference's states to the last bit.

        Returns the position.
        """
        stepped = await self.session.step(_TAIL, states=True)
        position = stepped.position - len(_TAIL)
        assert position in outcomes, f"the session stood at {position}, and not at one of {list(outcomes)}"
        await outcomes[position](self.reference)
        expected = await self.reference.step(_TAIL, states=True)
        assert stepped.position == expected.position == self.session.position
        np.testing.assert_array_equal(stepped.states, expected.states)
        return position

    async def check_whole(self, interrupted: Interrupted, none: int, whole: int, effect: Any) -> None:
        """The interrupted call has taken effect wholly or not at all: by position."""
        outcomes = {none: nothing, whole: effect}
        if interrupted.is_finished:
            del outcomes[none]
        elif not interrupted.was_begun:
            del outcomes[whole]
        await self.check(outcomes)

    async def close(self) -> None:
        await self.session.close()
        await self.reference.close()


def other_tasks() -> set[asyncio.Task[Any]]:
    """Those of the event loop beside the one that asks."""
    return asyncio.all_tasks() - {asyncio.current_task()}


async def until_open(other: AsyncClient, expected: set[str]) -> None:
    """Waits until the server has these sessions and no others."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := {session.id for session in await other.sessions()}) != expected:
        assert time.monotonic() < deadline, f"open: {sorted(found - expected)}, missing: {sorted(expected - found)}"
        await asyncio.sleep(0.02)


async def assert_nothing_is_left(client: AsyncClient, server: ServerProcess, sessions: Sequence[AsyncSession]) -> None:
    """Nothing of any call is left with the client, which has these sessions, and nothing with the server."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (left := _left(client, sessions)) or not _is_idle(await asyncio.to_thread(Metrics.of, server)):
        assert time.monotonic() < deadline, left or "the server has work left"
        await asyncio.sleep(0.02)


def _left(client: AsyncClient, sessions: Sequence[AsyncSession]) -> list[str]:
    """What waits, or is remembered without need."""
    left = []
    hub = client._hub
    for replica in hub.replicas:
        connection = replica._connection
        if connection is None:
            continue
        unanswered = connection.conversation._unanswered
        for name in ("runs", "blocks", "opens", "orders", "unwanted_handles"):
            if getattr(unanswered, name):
                left.append(f"{name}: {getattr(unanswered, name)}")
        held = {ledger.session_id for ledger in unanswered.ledger_by_handle.values()}
        if not held <= {session.id for session in sessions}:
            left.append(f"held: {held}")
    for session in sessions:
        ledger = session._attachment.ledger
        facts = (ledger.num_unanswered, ledger.unanswered_bytes, ledger.num_waiting, ledger.stranded, ledger._watchers)
        if any(facts) or ledger.settling:
            left.append(f"{session}: {facts}")
        ledger.has_kept_room(0)  # lets go of what has become safe before its answer came
        if ledger.kept is not None and (ledger.kept.end != session.position or ledger.kept.start != session.position):
            left.append(f"{session}: kept from {ledger.kept.start} to {ledger.kept.end}, {ledger.durable_position}")
    gc.collect()
    others = {attachment.ledger.session_id for attachment in hub.attachments} - {session.id for session in sessions}
    if others:
        left.append(f"attachments: {others}")
    if forgotten := {session.id for session in hub._sessions} - {session.id for session in sessions}:
        left.append(f"sessions to close: {forgotten}")
    return left


def _is_idle(metrics: Metrics) -> bool:
    return metrics.total("cellserve_steps_pending") == 0
