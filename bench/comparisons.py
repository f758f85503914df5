"""What is compared with what: the service's loops, each with the limit that it is sampled in turns with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.echo import EchoClient
from bench.loops import Loop, long_runs, single_steps, step_columns, timed
from bench.processes import Worker
from bench.report import Comparison
from cellserve import AsyncClient, AsyncSession

__all__ = ["HIDDEN_SIZES", "NUM_STREAMS", "Bench", "CheckError"]

HIDDEN_SIZES: Final = (128, 512)
NUM_STREAMS: Final = 256
_NUM_TOKENS: Final = 64  # prepared for each session, and taken round and round
_RUN_TOKENS: Final = 1024
_CALIBRATION_STEPS: Final = 8
# Where the two likeliest tokens are closer than this, rounding may choose either.
_MIN_LEAD: Final = 1e-3

MakeLoop = Callable[[Sequence[AsyncSession], npt.NDArray[np.int64]], Loop]
Limit = Callable[[], Awaitable[float]]  # tokens/s


class CheckError(Exception):
    """The service answers something else than the reference: its speed is of no interest."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a comparison is made: sessions of a model, what is done with them, and the limit."""

    comparison: Comparison
    hidden_size: int
    num_sessions: int
    make_loop: MakeLoop
    limit: Limit
    num_tokens: int = _NUM_TOKENS


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is running. models: the directory that the server serves. seconds: of a sample."""

    client: AsyncClient
    server_pid: int
    echo: EchoClient
    reference: Worker
    models: Path
    seconds: float
    rounds: int

    async def check(self) -> None:
        """Compare next tokens with those of the reference in float64. Raises CheckError."""
        for hidden_size in HIDDEN_SIZES:
            tokens = _tokens(_NUM_TOKENS, 256)
            best, leads = await self.reference.call("most_likely_tokens", self.models, hidden_size, tokens)
            sessions = await self.client.open_sessions(f"gru{hidden_size}", tokens.shape[1])
            answers = await asyncio.gather(
                *(_next_tokens(session, column) for session, column in zip(sessions, tokens.T.tolist(), strict=True))
            )
            await asyncio.gather(*(session.close() for session in sessions))
            wrong = (best != np.array(answers).T) & (leads > _MIN_LEAD)
            if wrong.any():
                raise CheckError(
                    f"gru{hidden_size}: {wrong.sum()} of {wrong.size} next tokens differ from the reference"
                )

    async def run(self, words: str, tell: Callable[[str], None]) -> list[Comparison]:
        """Every comparison with these words in its name. tell: takes a line about each as it begins."""
        comparisons = []
        for plan in self._plans():
            comparison = plan.comparison
            if words in comparison.name:
                tell(f"{comparison.name}; beside it {comparison.limit_name}")
                await self._sample(plan)
                comparisons.append(comparison)
        return comparisons

    def _plans(self) -> list[_Plan]:
        def step_of(batch_size: int) -> str:
            return f"in-process step of {batch_size}, one thread"

        def columns(sessions: Sequence[AsyncSession], tokens: npt.NDArray[np.int64]) -> Loop:
            return step_columns(self.client, sessions, tokens)

        return [
            *(
                _Plan(
                    Comparison(f"{num_sessions} coroutines, H=512", step_of(num_sessions), goal),
                    512,
                    num_sessions,
                    single_steps,
                    self._stepping(512, num_sessions),
                )
                for num_sessions, goal in ((256, 0.8), (64, None), (1, None))
            ),
            _Plan(
                Comparison("256 coroutines, H=128", f"echo on {NUM_STREAMS} streams", 6.0),
                128,
                256,
                single_steps,
                self._echoing,
            ),
            _Plan(
                Comparison("4096 sessions by step_many, H=128", step_of(256)),
                128,
                4096,
                columns,
                self._stepping(128, 256),
            ),
            _Plan(
                Comparison(f"64 sessions, log-probabilities of {_RUN_TOKENS} tokens, H=512", step_of(64)),
                512,
                64,
                long_runs,
                self._stepping(512, 64, output="logprob"),
                num_tokens=_RUN_TOKENS,
            ),
        ]

    async def _sample(self, plan: _Plan) -> None:
        sessions = await self.client.open_sessions(f"gru{plan.hidden_size}", plan.num_sessions)
        loop = plan.make_loop(sessions, _tokens(plan.num_tokens, plan.num_sessions))
        num_steps = _CALIBRATION_STEPS
        for seconds in (self.seconds / 10, self.seconds):
            trial = await timed(loop, sessions, num_steps, self.server_pid)
            num_steps = max(_CALIBRATION_STEPS, round(trial.tokens_per_second * seconds / plan.num_sessions))
        for _ in range(self.rounds):
            plan.comparison.limits.append(await plan.limit())
            plan.comparison.samples.append(await timed(loop, sessions, num_steps, self.server_pid))
        await asyncio.gather(*(session.close() for session in sessions))

    def _stepping(self, hidden_size: int, batch_size: int, output: str = "next_token") -> Limit:
        async def limit() -> float:
            rate: float = await self.reference.call(
                "tokens_per_second",
                self.models,
                hidden_size=hidden_size,
                batch_size=batch_size,
                seconds=self.seconds,
                output=output,
            )
            return rate

        return limit

    async def _echoing(self) -> float:
        rate = await self.echo.tokens_per_second(_CALIBRATION_STEPS)
        return await self.echo.tokens_per_second(max(1, round(rate * self.seconds / NUM_STREAMS)))


async def _next_tokens(session: AsyncSession, column: list[int]) -> list[int]:
    answers = []
    for token in column:
        result = await session.step(token)
        assert result.next_token is not None
        answers.append(int(result.next_token[0]))
    return answers


def _tokens(num_tokens: int, num_sessions: int) -> npt.NDArray[np.int64]:
    """Random bytes: (T, sessions)."""
    return np.random.default_rng(1).integers(0, 256, (num_tokens, num_sessions))
