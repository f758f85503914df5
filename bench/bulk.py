"""A client that sends long runs for a while; in a process of its own (see processes.Worker)."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import numpy as np

from cellserve import AsyncClient

__all__ = ["step_long_runs"]

_RUN_TOKENS: Final = 65_536


def step_long_runs(target: str, model: str, seconds: float) -> float:
    """One session consumes chunks of 64 K tokens for so long; returns tokens a second, as far as they were consumed."""
    return asyncio.run(_step_long_runs(target, model, seconds))


async def _step_long_runs(target: str, model: str, seconds: float) -> float:
    tokens = np.random.default_rng(0).integers(0, 256, _RUN_TOKENS)
    async with AsyncClient(target, timeout_seconds=600) as client:
        session = await client.open_session(model)

        async def run() -> None:
            while True:
                await session.step(tokens, at="none")

        begin = time.perf_counter()
        running = asyncio.create_task(run())
        await asyncio.sleep(seconds)
        # The server tells how far a step has come; the session itself only of whole ones.
        served = await client.sessions(model)
        elapsed = time.perf_counter() - begin
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return next(info.position for info in served if info.id == session.id) / elapsed
