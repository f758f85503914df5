"""What every benchmark is given: how long and how often to measure, servers, models, and where rows go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.models import write_model
from bench.processes import Worker
from bench.rows import Row
from bench.samples import Sample
from cellserve import AsyncClient, AsyncSession
from demo.server_process import ServerProcess

__all__ = ["Bench", "CheckError", "Effort", "check_against", "check_next_tokens", "tokens_for"]

# Where the two likeliest tokens are closer than this, rounding may choose either.
_MIN_LEAD: Final = 1e-3
_NUM_CHECKED_TOKENS: Final = 64


class CheckError(Exception):
    """The service answers something else than it must: its speed is of no interest."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    seconds: of a sample of the service. kernel_seconds: of a cell. turns: samples of each, alternated. pairs: where
    processor times are compared. is_quick: fewer and smaller sizes. hidden_sizes, batch_sizes: the only ones of K1,
    where there are any.
    """

    seconds: float
    kernel_seconds: float
    turns: int
    pairs: int
    is_quick: bool
    hidden_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Bench:
    """Everything that benchmarks share. add: takes a finished row. tell: takes a line about what is measured now."""

    directory: Path
    effort: Effort
    add: Callable[[Row], None]
    tell: Callable[[str], None]
    server_options: list[str] = field(default_factory=list)
    reference: Worker = field(default_factory=lambda: Worker("bench.reference"))
    cells: Worker = field(default_factory=lambda: Worker("bench.cell_timing"))
    _logs: itertools.count[int] = field(default_factory=itertools.count)

    def model(self, hidden_size: int, cell: str = "gru") -> Path:
        """The directory of one version of a model with a head: served as <cell><hidden size> by `server`."""
        return write_model(self._models / f"{cell}{hidden_size}", cell, hidden_size, has_head=True)

    def server(self, *options: str, module: str = "cellserve_service") -> ServerProcess:
        """A server of its own process that serves the models asked for so far; a context manager."""
        log = self.directory / f"server-{next(self._logs)}.log"
        return ServerProcess(log, [f"--models={self._models}", *options, *self.server_options], ("-m", module))

    def null_server(self, *options: str) -> ServerProcess:
        """The same with a model that computes nothing."""
        return self.server(*options, module="bench.null_server")

    async def step_rate(self, model: Path, batch_size: int) -> float:
        """Tokens a second of the reference step: plain torch operations in process, one thread, the head included."""
        rate: float = await self.reference.call(
            "tokens_per_second", model, batch_size=batch_size, seconds=self.effort.seconds
        )
        return rate

    async def alternate(
        self,
        row: Row,
        ours: Callable[[], Awaitable[Sample]],
        limit: Callable[[], Awaitable[float]] | None,
    ) -> None:
        """Sample tokens a second of ours and of the limit in turns, and finish the row."""
        self.tell(f"{row.id}: {row.name}; beside it {row.beside or 'nothing'}")
        for _ in range(self.effort.turns):
            beside = None if limit is None else await limit()
            sample = await ours()
            row.add(sample.tokens_per_second, beside, **sample.details)
        self.add(row)

    def close(self) -> None:
        self.reference.close()
        self.cells.close()

    @property
    def _models(self) -> Path:
        models = self.directory / "models"
        models.mkdir(exist_ok=True)
        return models


async def check_next_tokens(bench: Bench, client: AsyncClient, hidden_size: int, cell: str = "gru") -> str:
    """Compare 64 next tokens of 32 sessions with float64. Raises CheckError; returns what was compared."""
    tokens = tokens_for(_NUM_CHECKED_TOKENS, 32)
    model = bench.model(hidden_size, cell)
    best, leads = await bench.reference.call("most_likely_tokens", model, tokens, cell)
    sessions = await client.open_sessions(model.parent.name, tokens.shape[1])
    answers = await asyncio.gather(
        *(_next_tokens(session, column) for session, column in zip(sessions, tokens.T.tolist(), strict=True))
    )
    await asyncio.gather(*(session.close() for session in sessions))
    check_against(np.array(answers).T, best, leads, model.parent.name)
    return "next tokens of 64 steps of 32 sessions against float64"


def check_against(
    found: npt.NDArray[np.int64], best: npt.NDArray[np.int64], leads: npt.NDArray[np.float64], name: str
) -> None:
    """Raises CheckError where tokens are not the likeliest by more than rounding explains. All: (T, sessions)."""
    wrong = (best != found) & (leads > _MIN_LEAD)
    if wrong.any():
        raise CheckError(f"{name}: {wrong.sum()} of {wrong.size} next tokens differ from the reference")


async def _next_tokens(session: AsyncSession, column: list[int]) -> list[int]:
    answers = []
    for token in column:
        result = await session.step(token)
        assert result.next_token is not None
        answers.append(int(result.next_token[0]))
    return answers


def tokens_for(num_tokens: int, num_sessions: int) -> npt.NDArray[np.int64]:
    """Random bytes: (T, sessions)."""
    return np.random.default_rng(1).integers(0, 256, (num_tokens, num_sessions))
