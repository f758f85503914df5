"""What many sessions do, fixed in advance, so that a disturbed run can be held against a quiet one, to the last bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellserve import AsyncClient, AsyncSession

CALL_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Step:
    """A run of tokens, and what is asked for: one of WISHES."""

    tokens: tuple[int, ...]
    wish: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Tokens that the server draws."""

    num_tokens: int
    seed: int
    temperature: float


Act = Step | Generate

WISHES: tuple[dict[str, Any], ...] = (
    {"at": "every", "next_token": True},
    {"at": "every", "logprobs": True, "top_k": 3},
    {"at": "last", "states": True},
    {"at": "none"},
)


@dataclass(slots=True)
class Story:
    """What one session did: every answer as bytes, and the state that it ended in."""

    answers: list[bytes]
    state: bytes = b""


def make_plan(seed: int, num_sessions: int, num_tokens: int, vocab_size: int) -> list[list[Act]]:
    """The acts of each session, num_tokens tokens in all: single steps, runs, now and then a generate."""
    random = np.random.default_rng(seed)
    plan: list[list[Act]] = []
    for _ in range(num_sessions):
        acts: list[Act] = []
        left = num_tokens
        while left:
            count = min(left, int(random.choice([1, 1, 1, 1, 2, 7, 40])))
            if random.random() < 0.05:
                acts.append(Generate(count, int(random.integers(1 << 40)), float(random.choice([0.0, 0.8, 1.3]))))
            else:
                tokens = random.integers(0, vocab_size, count).tolist()
                acts.append(Step(tuple(tokens), int(random.integers(len(WISHES)))))
            left -= count
        plan.append(acts)
    return plan


class Pace:
    """Holds sessions back, so that every disturbance meets sessions at work."""

    def __init__(self) -> None:
        self._allowed = 1.0
        self._changed = asyncio.Condition()

    async def allow(self, fraction: float) -> None:
        """Let the sessions do this part of their tokens."""
        self._allowed = fraction
        async with self._changed:
            self._changed.notify_all()

    async def wait(self, fraction: float) -> None:
        """Wait until so much may be done."""
        if fraction <= self._allowed:
            return
        async with self._changed:
            await self._changed.wait_for(lambda: fraction <= self._allowed)


async def run_plan(
    client: AsyncClient,
    model: str,
    plan: Sequence[Sequence[Act]],
    *,
    prefix: str,
    durability: Any = None,
    pace: Pace | None = None,
    stepped: Callable[[int], None] = lambda _: None,
) -> list[Story]:
    """Let every session do its acts, all at once; whatever a call raises ends the run."""

    async def follow(number: int, acts: Sequence[Act]) -> Story:
        num_tokens = sum(act.num_tokens if isinstance(act, Generate) else len(act.tokens) for act in acts)
        session = await client.open_session(
            model, id=f"{prefix}-{number}", durability=durability, timeout_seconds=CALL_TIMEOUT_SECONDS
        )
        story = Story([])
        for act in acts:
            if pace is not None:
                await pace.wait(session.position / num_tokens)
            story.answers.append(await _do(session, act))
            stepped(session.position)
        assert session.position == num_tokens
        story.state = await session.export_state(timeout_seconds=CALL_TIMEOUT_SECONDS)
        await session.close(timeout_seconds=CALL_TIMEOUT_SECONDS)
        return story

    async with asyncio.TaskGroup() as tasks:
        following = [tasks.create_task(follow(number, acts)) for number, acts in enumerate(plan)]
    return [task.result() for task in following]


async def _do(session: AsyncSession, act: Act) -> bytes:
    if isinstance(act, Generate):
        generation = session.generate(
            act.num_tokens,
            temperature=act.temperature,
            seed=act.seed,
            logprobs=True,
            timeout_seconds=CALL_TIMEOUT_SECONDS,
        )
        tokens = [token async for token in generation]
        return np.array(tokens, np.int64).tobytes() + np.array(generation.logprobs, np.float32).tobytes()
    result = await session.step(list(act.tokens), timeout_seconds=CALL_TIMEOUT_SECONDS, **WISHES[act.wish])
    columns = (result.next_token, result.logprobs, result.top_tokens, result.top_logprobs, result.states)
    said = b"".join(b"" if column is None else np.ascontiguousarray(column).tobytes() for column in columns)
    return result.position.to_bytes(8, "little") + said


def differences(quiet: Sequence[Story], disturbed: Sequence[Story]) -> list[str]:
    """Where a disturbed run is not the quiet one; empty: it is the same to the last bit."""
    found = []
    for number, (one, other) in enumerate(zip(quiet, disturbed, strict=True)):
        for act, (answer, again) in enumerate(zip(one.answers, other.answers, strict=True)):
            if answer != again:
                found.append(f"session {number}, act {act}: another answer")
                break
        if one.state != other.state:
            found.append(f"session {number}: another state")
    return found
