"""What durability and determinism cost, in processor time per token: pairs of samples in turns, with an interval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from bench.loops import single_steps, timed
from bench.processes import Worker
from bench.report import Sample
from cellserve import AsyncClient

__all__ = ["Cost", "determinism_costs", "durability_costs", "print_costs"]

NUM_SESSIONS: Final = 256
NUM_TOKENS: Final = 64
_RESAMPLES: Final = 10_000
# A checkpoint of what a sample has changed, and the answer to it, belong to the sample.
_SETTLE_SECONDS: Final = 1.3


@dataclass(slots=True)
class Cost:
    """A way of doing something beside the plain one, sampled in turns. goal: the most that the ratio may be."""

    name: str
    plain_name: str
    goal: float | None = None
    costs: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return float(np.median(self._ratios()))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median of the ratios lies with 95 % confidence, by resampling the pairs."""
        ratios = self._ratios()
        random = np.random.default_rng(0)
        medians = np.median(ratios[random.integers(0, len(ratios), (_RESAMPLES, len(ratios)))], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        return float(low), float(high)

    def _ratios(self) -> npt.NDArray[np.float64]:
        ratios: npt.NDArray[np.float64] = np.array(self.costs) / np.array(self.plain)
        return ratios


async def durability_costs(
    client: AsyncClient,
    server_pid: int,
    model: str,
    *,
    durability: Literal["periodic", "sync"],
    pairs: int,
    seconds: float,
    goal: float | None,
    tell: Callable[[str], None],
) -> list[Cost]:
    """Single steps of 256 sessions that are durable, beside as many that are not, on one server with a store."""
    tokens = np.random.default_rng(0).integers(0, 256, (NUM_TOKENS, NUM_SESSIONS))
    loops = {}
    num_steps = {}
    for kind in ("none", durability):
        sessions = await client.open_sessions(model, NUM_SESSIONS, durability=kind)
        loop = single_steps(sessions, tokens)
        trial = await timed(loop, sessions, NUM_TOKENS, server_pid)
        num_steps[kind] = max(NUM_TOKENS, round(trial.tokens_per_second * seconds / NUM_SESSIONS))
        loops[kind] = (loop, sessions)
    steps = min(num_steps.values())
    of_server = Cost(f"{durability}: server CPU", "none", goal)
    of_client = Cost(f"{durability}: client CPU", "none", goal)

    async def sample(kind: str) -> Sample:
        loop, sessions = loops[kind]
        return await timed(loop, sessions, steps, server_pid, settle_seconds=_SETTLE_SECONDS)

    tell(f"{durability} beside none, {pairs} pairs of {steps * NUM_SESSIONS:,} tokens")
    for pair in range(pairs):
        order = ("none", durability) if pair % 2 else (durability, "none")
        samples = {kind: await sample(kind) for kind in order}
        for cost, name in ((of_server, "server_cpu_microseconds"), (of_client, "client_cpu_microseconds")):
            cost.costs.append(getattr(samples[durability], name))
            cost.plain.append(getattr(samples["none"], name))
    for _, sessions in loops.values():
        await asyncio.gather(*(session.close() for session in sessions))
    return [of_server, of_client]


async def determinism_costs(reference: Worker, directory: object, *, pairs: int, seconds: float) -> list[Cost]:
    """The stepper's processor time with `deterministic` on, beside off, for some batch sizes."""
    costs = []
    for batch_size in (1, 8, 64, 128):
        cost = Cost(f"deterministic: stepper, batch {batch_size}, H=512", "off")
        for _ in range(pairs):
            for into, deterministic in ((cost.costs, True), (cost.plain, False)):
                into.append(
                    await reference.call(
                        "stepper_microseconds",
                        directory,
                        hidden_size=512,
                        batch_size=batch_size,
                        deterministic=deterministic,
                        seconds=seconds,
                    )
                )
        costs.append(cost)
    return costs


def print_costs(console: Console, costs: Sequence[Cost]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("cost")
    table.add_column("beside")
    for name in ("us a token", "plain", "ratio", "95 % interval", "goal"):
        table.add_column(name, justify="right")
    for cost in costs:
        low, high = cost.interval
        verdict = "" if cost.goal is None else f"<= {cost.goal:g} {'reached' if cost.ratio <= cost.goal else 'MISSED'}"
        table.add_row(
            cost.name,
            cost.plain_name,
            f"{np.median(cost.costs):.2f}",
            f"{np.median(cost.plain):.2f}",
            f"{cost.ratio:.3f}",
            f"{low:.3f} to {high:.3f}",
            verdict,
        )
    console.print(table)
