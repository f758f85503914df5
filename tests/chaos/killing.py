"""Kills server processes at random moments and starts them again, while sessions are at work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from tests.chaos.plan import Pace
from tests.support.server import ServerProcess


async def kill_in_turn(
    servers: Sequence[ServerProcess], pace: Pace, *, num_kills: int, interval_seconds: float, seed: int
) -> None:
    """SIGKILL the servers in turn, each at least one checkpoint after its start, and start each again."""
    random = np.random.default_rng(seed)
    loop = asyncio.get_running_loop()
    started_at = [loop.time()] * len(servers)
    for number in range(num_kills):
        await pace.allow((number + 1) / (num_kills + 1))
        place = number % len(servers)
        seconds = started_at[place] + 1.5 * interval_seconds - loop.time()
        await asyncio.sleep(max(0.0, seconds) + float(random.uniform(0.05, 0.6)))
        await asyncio.to_thread(servers[place].kill)
        await asyncio.to_thread(servers[place].start)
        started_at[place] = loop.time()
    await pace.allow(1.0)
