"""Follows many texts at once: a session and a coroutine each, one byte a step, each step once the last is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cellserve import AsyncClient, AsyncSession
from cellserve.cli.surprise import bits_of
from demo.files import Excerpt

__all__ = ["Followed", "follow_all"]

_REFRESH_SECONDS: Final = 0.2
_REPORT_SECONDS: Final = 5.0  # where there is no terminal for a bar


@dataclass(frozen=True, slots=True)
class Followed:
    """What the model made of an excerpt. bits: the surprisal of each byte."""

    excerpt: Excerpt
    bits: npt.NDArray[np.float64]

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.mean())


async def follow_all(client: AsyncClient, model: str, excerpts: Sequence[Excerpt], console: Console) -> list[Followed]:
    """Follow every excerpt from position 0 to its end, showing how far it is."""
    sessions = await client.open_sessions(model, len(excerpts))
    reporter = asyncio.create_task(_show_progress(sessions, sum(len(each.content) for each in excerpts), console))
    try:
        followed = await asyncio.gather(
            *(_follow(session, excerpt) for session, excerpt in zip(sessions, excerpts, strict=True))
        )
    finally:
        reporter.cancel()
    for session in sessions:
        await session.close()
    return followed


async def _follow(session: AsyncSession, excerpt: Excerpt) -> Followed:
    logprobs = np.empty(len(excerpt.content), dtype=np.float32)
    for place, byte in enumerate(excerpt.content):
        result = await session.step(byte, next_token=False, logprobs=True)
        assert result.logprobs is not None
        logprobs[place] = result.logprobs[0]
    return Followed(excerpt, bits_of(logprobs))


async def _show_progress(sessions: Sequence[AsyncSession], total: int, console: Console) -> None:
    """A bar on a terminal, elsewhere a line now and then; until it is cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            console.print(f"{_num_done(sessions):,} of {total:,} bytes")
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.completed:,} bytes"), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("bytes", total=total)
        try:
            while True:
                await asyncio.sleep(_REFRESH_SECONDS)
                progress.update(bar, completed=_num_done(sessions), refresh=True)
        finally:
            progress.update(bar, completed=_num_done(sessions), refresh=True)


def _num_done(sessions: Sequence[AsyncSession]) -> int:
    return sum(session.position for session in sessions)
