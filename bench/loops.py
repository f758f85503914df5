"""What a client does while it is timed: many coroutines that step, columns of many sessions, long runs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.report import Sample
from cellserve import AsyncClient, AsyncSession

__all__ = ["Loop", "cpu_seconds", "long_runs", "single_steps", "step_columns", "timed"]

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
# To take the time of every step would itself take time.
_TIMED_ONE_IN: Final = 16

# Advances its sessions by a number of tokens each; returns how long each step took.
Loop = Callable[[int], Awaitable[list[float]]]


def single_steps(sessions: Sequence[AsyncSession], tokens: npt.NDArray[np.int64]) -> Loop:
    """Every session has a coroutine of its own that awaits one token after the other. tokens: (T, sessions)."""
    columns = tokens.T.tolist()

    async def follow(session: AsyncSession, column: list[int], num_steps: int) -> None:
        for step in range(num_steps):
            await session.step(column[step % len(column)])

    async def follow_timed(session: AsyncSession, column: list[int], num_steps: int, latencies: list[float]) -> None:
        for step in range(num_steps):
            begin = time.perf_counter()
            await session.step(column[step % len(column)])
            latencies.append(time.perf_counter() - begin)

    async def run(num_steps: int) -> list[float]:
        latencies: list[float] = []
        async with asyncio.TaskGroup() as tasks:
            for number, (session, column) in enumerate(zip(sessions, columns, strict=True)):
                if number % _TIMED_ONE_IN:
                    tasks.create_task(follow(session, column, num_steps))
                else:
                    tasks.create_task(follow_timed(session, column, num_steps, latencies))
        return latencies

    return run


def step_columns(client: AsyncClient, sessions: Sequence[AsyncSession], tokens: npt.NDArray[np.int64]) -> Loop:
    """All sessions advance together by step_many, one token each. tokens: (T, sessions)."""

    async def run(num_steps: int) -> list[float]:
        latencies = []
        for step in range(num_steps):
            begin = time.perf_counter()
            await client.step_many(sessions, tokens[step % len(tokens)])
            latencies.append(time.perf_counter() - begin)
        return latencies

    return run


def long_runs(sessions: Sequence[AsyncSession], tokens: npt.NDArray[np.int64]) -> Loop:
    """Every session has a coroutine that asks for the log-probabilities of T tokens at once. tokens: (T, sessions)."""
    texts = [bytes(column) for column in tokens.T.tolist()]

    async def follow(session: AsyncSession, text: bytes, num_steps: int, latencies: list[float]) -> None:
        for _ in range(0, num_steps, len(text)):
            begin = time.perf_counter()
            await session.step(text, next_token=False, logprobs=True)
            latencies.append(time.perf_counter() - begin)

    async def run(num_steps: int) -> list[float]:
        latencies: list[float] = []
        async with asyncio.TaskGroup() as tasks:
            for session, text in zip(sessions, texts, strict=True):
                tasks.create_task(follow(session, text, num_steps, latencies))
        return latencies

    return run


async def timed(
    loop: Loop, sessions: Sequence[AsyncSession], num_steps: int, server_pid: int, *, settle_seconds: float = 0.0
) -> Sample:
    """Time a loop, and count the processor time of both processes, also in the settle_seconds behind it."""
    position = sum(session.position for session in sessions)
    client_cpu, server_cpu = time.process_time(), cpu_seconds(server_pid)
    begin = time.perf_counter()
    latencies = await loop(num_steps)
    seconds = time.perf_counter() - begin
    await asyncio.sleep(settle_seconds)
    num_tokens = sum(session.position for session in sessions) - position
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return Sample(
        tokens_per_second=num_tokens / seconds,
        p50_seconds=float(p50),
        p99_seconds=float(p99),
        client_cpu_microseconds=1e6 * (time.process_time() - client_cpu) / num_tokens,
        server_cpu_microseconds=1e6 * (cpu_seconds(server_pid) - server_cpu) / num_tokens,
    )


def cpu_seconds(pid: int) -> float:
    """Processor time of another process, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
