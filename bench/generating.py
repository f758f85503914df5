"""E4: sampling on the server, beside the same loop in process without gRPC."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import numpy as np

from bench.rows import Goal, Row
from bench.running import Bench, check_against
from bench.samples import Sample, cpu_seconds
from cellserve import AsyncClient, AsyncSession

__all__ = ["generate"]

_HIDDEN_SIZE: Final = 512
_NUM_CHECKED: Final = 32
_TIMEOUT_SECONDS: Final = 600.0  # a slow server is to be measured, not given up
_SLICE_TOKENS: Final = 16  # of a call of the loop in process


async def generate(bench: Bench) -> None:
    """E4: tokens a second that 1, 64 and 1,024 sessions sample at once."""
    model = bench.model(_HIDDEN_SIZE)
    with bench.server() as server:
        async with AsyncClient(server.target) as client:
            checked = await _check(bench, client)
            for number in (16,) if bench.effort.is_quick else (1, 64, 1024):
                size = {"H": _HIDDEN_SIZE, "sessions": number}
                row = Row("E4", "generate", size, "tokens/s", "the stepper's loop in process", Goal(">=", 0.8), checked)
                sessions = await client.open_sessions(model.parent.name, number)
                trial = await _sample(sessions, _SLICE_TOKENS, server.pid)
                num_tokens = max(_SLICE_TOKENS, round(trial.tokens_per_second * bench.effort.seconds / number))

                async def limit(number: int = number) -> float:
                    rate: float = await bench.reference.call(
                        "generated_per_second",
                        model,
                        num_sessions=number,
                        num_tokens=_SLICE_TOKENS,
                        seconds=bench.effort.seconds,
                    )
                    return rate

                async def ours(sessions: list[AsyncSession] = sessions, num_tokens: int = num_tokens) -> Sample:
                    return await _sample(sessions, num_tokens, server.pid)

                await bench.alternate(row, ours, limit)
                await asyncio.gather(*(session.close() for session in sessions))


async def _check(bench: Bench, client: AsyncClient) -> str:
    """Greedy tokens are the likeliest ones after all tokens before them, by float64."""
    model = bench.model(_HIDDEN_SIZE)
    sessions = await client.open_sessions(model.parent.name, 8)
    prompt = np.arange(8)
    await asyncio.gather(*(session.step(int(token)) for session, token in zip(sessions, prompt, strict=True)))

    async def sample(session: AsyncSession) -> list[int]:
        return [token async for token in session.generate(_NUM_CHECKED, temperature=0.0)]

    sampled = np.array(await asyncio.gather(*(sample(session) for session in sessions))).T  # (T, sessions)
    fed = np.concatenate([prompt[None], sampled[:-1]])
    best, leads = await bench.reference.call("most_likely_tokens", model, fed)
    check_against(sampled, best, leads, "generate")
    await asyncio.gather(*(session.close() for session in sessions))
    return f"{_NUM_CHECKED} greedy tokens of 8 sessions against float64"


async def _sample(sessions: list[AsyncSession], num_tokens: int, server_pid: int) -> Sample:
    """Every session generates so many tokens; latencies are those to the first token and of the whole."""
    firsts: list[float] = []

    async def follow(session: AsyncSession) -> None:
        begin = time.perf_counter()
        is_first = True
        async for _ in session.generate(num_tokens, timeout_seconds=_TIMEOUT_SECONDS):
            if is_first:
                firsts.append(time.perf_counter() - begin)
                is_first = False

    client_cpu, server_cpu = time.process_time(), cpu_seconds(server_pid)
    begin = time.perf_counter()
    await asyncio.gather(*(follow(session) for session in sessions))
    elapsed = time.perf_counter() - begin
    total = num_tokens * len(sessions)
    p50, p99 = np.quantile(firsts, [0.5, 0.99])
    return Sample(
        tokens_per_second=total / elapsed,
        p50_seconds=float(p50),
        p99_seconds=float(p99),
        client_cpu_microseconds=1e6 * (time.process_time() - client_cpu) / total,
        server_cpu_microseconds=1e6 * (cpu_seconds(server_pid) - server_cpu) / total,
    )
