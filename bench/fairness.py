"""F1: a client that sends long runs beside interactive ones."""

from __future__ import annotations

import asyncio
from typing import Final

from bench.processes import Worker
from bench.rows import Goal, Row
from bench.running import Bench, check_next_tokens
from cellserve import AsyncClient, AsyncSession
from cellserve.load import Driver, LoadResult, parse_mix

__all__ = ["fairness"]

_HIDDEN_SIZE: Final = 512
_NUM_INTERACTIVE: Final = 100
_RATE: Final = _NUM_INTERACTIVE / 0.02  # each a token every 20 ms
_BEGIN_SECONDS: Final = 0.5  # the bulk client connects


async def fairness(bench: Bench) -> None:
    """F1: the interactive sessions' p99 with the bulk client beside that without; and the bulk client's own rate."""
    model = bench.model(_HIDDEN_SIZE).parent.name
    seconds = 2 * bench.effort.seconds
    size = {"H": _HIDDEN_SIZE, "sessions": _NUM_INTERACTIVE, "requests/s": round(_RATE)}
    bulk = Worker("bench.bulk")
    try:
        with bench.server() as server:
            async with AsyncClient(server.target) as client:
                checked = await check_next_tokens(bench, client, _HIDDEN_SIZE)
                info = next(info for info in await client.models() if info.name == model)
                driver = Driver(client, info, parse_mix("step"))
                sessions = await driver.open_sessions(_NUM_INTERACTIVE)
                latency = Row(
                    "F1", "interactive p99 beside a bulk client", size, "ms", "without it", Goal("<=", 2.5), checked
                )
                rate = Row("F1", "bulk client beside 100 interactive", size, "tokens/s", "alone", Goal(">=", 0.6))
                rate.checked = checked
                bench.tell(f"F1: {latency.name}")
                await driver.run(sessions, seconds / 4, rate=_RATE, arrivals="even")
                await bulk.call("step_long_runs", server.target, model, seconds / 4)
                for _ in range(bench.effort.turns):
                    alone = await driver.run(sessions, seconds, rate=_RATE, arrivals="even")
                    solo: float = await bulk.call("step_long_runs", server.target, model, seconds)
                    both, beside = await _together(driver, sessions, bulk, server.target, model, seconds)
                    latency.add(_p99(both), _p99(alone), refused=both.num_failures + alone.num_failures)
                    rate.add(beside, solo)
                bench.add(latency)
                bench.add(rate)
    finally:
        bulk.close()


async def _together(
    driver: Driver, sessions: list[AsyncSession], bulk: Worker, target: str, model: str, seconds: float
) -> tuple[LoadResult, float]:
    """The interactive load, and the bulk client's rate over a time that encloses it."""
    running = asyncio.create_task(bulk.call("step_long_runs", target, model, seconds + 2 * _BEGIN_SECONDS))
    await asyncio.sleep(_BEGIN_SECONDS)
    result = await driver.run(sessions, seconds, rate=_RATE, arrivals="even")
    beside: float = await running
    return result, beside


def _p99(result: LoadResult) -> float:
    p99 = result.quantile(0.99)
    assert p99 is not None
    return 1000 * p99
