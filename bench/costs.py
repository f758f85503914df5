"""D1 and O1: what durability, metrics and logs cost in processor time per token, by pairs in turns."""

from __future__ import annotations

import asyncio
from typing import Final, Literal

from bench.loops import num_steps_for, single_steps, timed
from bench.rows import Goal, Row
from bench.running import Bench, check_next_tokens, tokens_for
from bench.samples import Sample
from cellserve import AsyncClient

__all__ = ["durability", "overhead"]

NUM_SESSIONS: Final = 256
_NUM_TOKENS: Final = 64
# A checkpoint of what a sample has changed, and the answer to it, belong to the sample.
_SETTLE_SECONDS: Final = 1.3


async def durability(bench: Bench) -> None:
    """D1: single steps of durable sessions, beside as many that are not, on one server with a store."""
    bench.model(512)
    kinds: list[tuple[Literal["periodic", "sync"], Goal | None]] = [("periodic", Goal("<=", 1.05)), ("sync", None)]
    with bench.server(f"--store=sqlite:///{bench.directory}/sessions.db") as server:
        async with AsyncClient(server.target) as client:
            checked = await check_next_tokens(bench, client, 512)
            for kind, goal in kinds:
                await _durability(bench, client, server.pid, kind, goal, checked)


async def _durability(
    bench: Bench,
    client: AsyncClient,
    server_pid: int,
    kind: Literal["periodic", "sync"],
    goal: Goal | None,
    checked: str,
) -> None:
    tokens = tokens_for(_NUM_TOKENS, NUM_SESSIONS)
    loops = {}
    for each in ("none", kind):
        sessions = await client.open_sessions("gru512", NUM_SESSIONS, durability=each)
        loop = single_steps(sessions, tokens)
        num_steps = await num_steps_for(loop, sessions, bench.effort.seconds, server_pid)
        loops[each] = (loop, sessions, num_steps)
    steps = min(num_steps for _, _, num_steps in loops.values())

    async def sample(of: str) -> Sample:
        loop, sessions, _ = loops[of]
        return await timed(loop, sessions, steps, server_pid, settle_seconds=_SETTLE_SECONDS)

    rows = [
        Row(
            "D1",
            f"{kind} on SQLite, {whose}",
            {"H": 512, "sessions": 256},
            "us/token",
            "durability none",
            limit,
            checked,
        )
        for whose, limit in (("server", goal), ("client", goal))
    ]
    bench.tell(f"D1: {kind} beside none, {bench.effort.pairs} pairs of {steps * NUM_SESSIONS:,} tokens")
    for pair in range(bench.effort.pairs):
        order = ("none", kind) if pair % 2 else (kind, "none")
        samples = {each: await sample(each) for each in order}
        rows[0].add(samples[kind].server_cpu_microseconds, samples["none"].server_cpu_microseconds)
        rows[1].add(samples[kind].client_cpu_microseconds, samples["none"].client_cpu_microseconds)
    for row in rows:
        bench.add(row)
    for _, sessions, _ in loops.values():
        await asyncio.gather(*(session.close() for session in sessions))


async def overhead(bench: Bench) -> None:
    """O1: single steps on the server as it is, beside one that neither counts nor logs; the smaller the cell, the more
    it shows."""
    bench.model(128)
    tokens = tokens_for(_NUM_TOKENS, NUM_SESSIONS)
    with bench.server() as counting, bench.server(module="bench.quiet_server") as quiet:
        async with AsyncClient(counting.target) as first, AsyncClient(quiet.target) as second:
            checked = await check_next_tokens(bench, first, 128)
            await check_next_tokens(bench, second, 128)
            loops, num_steps = [], []
            for client, server in ((first, counting), (second, quiet)):
                sessions = await client.open_sessions("gru128", NUM_SESSIONS)
                loop = single_steps(sessions, tokens)
                num_steps.append(await num_steps_for(loop, sessions, bench.effort.seconds, server.pid))
                loops.append((loop, sessions, server.pid))
            size = {"H": 128, "sessions": NUM_SESSIONS}
            row = Row("O1", "metrics and logs, server", size, "us/token", "neither", Goal("<=", 1.02), checked)
            bench.tell(f"O1: metrics and logs, {bench.effort.pairs} pairs of {min(num_steps) * NUM_SESSIONS:,} tokens")
            for pair in range(bench.effort.pairs):
                samples = {}
                for which in (0, 1) if pair % 2 else (1, 0):
                    loop, sessions, pid = loops[which]
                    samples[which] = await timed(loop, sessions, min(num_steps), pid)
                row.add(samples[0].server_cpu_microseconds, samples[1].server_cpu_microseconds)
            bench.add(row)
