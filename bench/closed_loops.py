"""E1: sessions that each send a token when they have the answer to the last, in the ways that clients do it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from bench.loops import Loop, long_runs, num_steps_for, single_steps, step_columns, timed
from bench.methods import ECHO_STREAM, NULL_MODEL
from bench.processes import PeerServer, echo_server
from bench.raw import Exchanger, measure
from bench.rows import Goal, Row
from bench.running import Bench, CheckError, check_next_tokens, tokens_for
from bench.samples import Sample
from bench.wire import beside_echo, open_streams
from cellserve import AsyncClient, AsyncSession
from demo.server_process import ServerProcess

__all__ = ["closed_loops"]

_NUM_TOKENS: Final = 64  # prepared for each session, and taken round and round
_RUN_TOKENS: Final = 1024
_ECHO: Final = "raw grpc.aio echo on 256 streams"

Limit = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class _Served:
    """A server with a client of it, the echo, and how the answers were checked."""

    bench: Bench
    client: AsyncClient
    server: ServerProcess
    echo: PeerServer
    checked: str

    async def alternate(self, row: Row, sessions: list[AsyncSession], loop: Loop, limit: Limit) -> None:
        """Sample a loop over the sessions and the limit in turns; close the sessions."""
        row.checked = self.checked
        pid = self.server.pid
        num_steps = await num_steps_for(loop, sessions, self.bench.effort.seconds, pid)
        await self.bench.alternate(row, lambda: timed(loop, sessions, num_steps, pid), limit)
        await asyncio.gather(*(session.close() for session in sessions))

    def step_rate(self, hidden_size: int, batch_size: int) -> Limit:
        return lambda: self.bench.step_rate(self.bench.model(hidden_size), batch_size)

    async def echo_rate(self) -> float:
        return (await _echo_sample(self.bench, self.echo, 256)).tokens_per_second


async def closed_loops(bench: Bench) -> None:
    """E1: by coroutines, by columns, on streams of their own, and alone."""
    for hidden_size in (128, 512):
        bench.model(hidden_size)
    with echo_server() as echo:
        with bench.server() as server:
            async with AsyncClient(server.target) as client:
                await check_next_tokens(bench, client, 128)
                served = _Served(bench, client, server, echo, await check_next_tokens(bench, client, 512))
                await _coroutines(served)
                await _columns(served)
                await _long_runs(served)
                await _one_session(served)
            await _separate_streams(served)
        with bench.null_server() as null:
            async with AsyncClient(null.target) as client:
                await _null_columns(
                    _Served(bench, client, null, echo, "every token of a call against the null model's")
                )


async def _coroutines(served: _Served) -> None:
    sizes = (
        [(512, 256, Goal(">=", 0.9))]
        if served.bench.effort.is_quick
        else [
            (512, 64, None),
            (512, 256, Goal(">=", 0.9)),
            (512, 1024, None),
            (512, 10_000, None),
        ]
    )
    for hidden_size, number, goal in sizes:
        batch_size = min(number, 256)
        size = {"H": hidden_size, "sessions": number}
        row = Row("E1", "coroutines, a token a call", size, "tokens/s", f"reference step of {batch_size}", goal)
        sessions = await served.client.open_sessions(f"gru{hidden_size}", number)
        loop = single_steps(sessions, tokens_for(_NUM_TOKENS, number))
        await served.alternate(row, sessions, loop, served.step_rate(hidden_size, batch_size))
    row = Row("E1", "coroutines, a token a call", {"H": 128, "sessions": 256}, "tokens/s", _ECHO, Goal(">=", 10))
    sessions = await served.client.open_sessions("gru128", 256)
    await served.alternate(row, sessions, single_steps(sessions, tokens_for(_NUM_TOKENS, 256)), served.echo_rate)


async def _columns(served: _Served) -> None:
    row = Row("E1", "step_many", {"H": 128, "sessions a call": 1024}, "tokens/s", _ECHO, Goal(">=", 20))
    sessions = await served.client.open_sessions("gru128", 1024)
    loop = step_columns(served.client, sessions, tokens_for(_NUM_TOKENS, 1024))
    await served.alternate(row, sessions, loop, served.echo_rate)
    if served.bench.effort.is_quick:
        return
    row = Row("E1", "step_many", {"H": 128, "sessions a call": 4096}, "tokens/s", "reference step of 256")
    sessions = await served.client.open_sessions("gru128", 4096)
    loop = step_columns(served.client, sessions, tokens_for(_NUM_TOKENS, 4096))
    await served.alternate(row, sessions, loop, served.step_rate(128, 256))


async def _long_runs(served: _Served) -> None:
    bench = served.bench

    async def limit() -> float:
        rate: float = await bench.reference.call(
            "tokens_per_second", bench.model(512), batch_size=64, seconds=bench.effort.seconds, output="logprob"
        )
        return rate

    size = {"H": 512, "sessions": 64, "tokens a call": _RUN_TOKENS}
    row = Row("E1", "log-probabilities of long runs", size, "tokens/s", "reference step of 64")
    sessions = await served.client.open_sessions("gru512", 64)
    await served.alternate(row, sessions, long_runs(sessions, tokens_for(_RUN_TOKENS, 64)), limit)


async def _one_session(served: _Served) -> None:
    """Its median latency, beside that of an echo and 1.2 times the bare step together."""
    bench = served.bench
    size = {"H": 512, "sessions": 1}
    row = Row("E1", "one session, a token a call, p50", size, "ms", "echo p50 + 1.2 reference steps", Goal("<=", 1.0))
    row.checked = served.checked
    bench.tell(f"E1: {row.name}, beside {row.beside}")
    sessions = await served.client.open_sessions("gru512", 1)
    loop = single_steps(sessions, tokens_for(_NUM_TOKENS, 1))
    num_steps = await num_steps_for(loop, sessions, bench.effort.seconds, served.server.pid)
    for _ in range(bench.effort.turns):
        echo = await _echo_sample(bench, served.echo, 1)
        step_seconds = 1 / await bench.step_rate(bench.model(512), 1)
        sample = await timed(loop, sessions, num_steps, served.server.pid)
        row.add(
            1000 * sample.p50_seconds,
            1000 * (echo.p50_seconds + 1.2 * step_seconds),
            echo_p50_ms=1000 * echo.p50_seconds,
            step_ms=1000 * step_seconds,
            **sample.details,
        )
    bench.add(row)
    await sessions[0].close()


async def _separate_streams(served: _Served) -> None:
    """Clients that share nothing: a stream each, on one connection; in full also a connection each."""
    bench = served.bench
    for num_channels in (1,) if bench.effort.is_quick else (1, 256):
        async with open_streams(served.server, "gru512", 256, num_channels=num_channels) as streams:
            size = {"H": 512, "streams": 256, "connections": num_channels}
            row = Row(
                "E1", "streams of their own, a token a message", size, "tokens/s", "raw grpc.aio echo of the same"
            )
            row.goal, row.checked = Goal(">=", 0.7), served.checked
            await beside_echo(bench, row, served.echo, streams, num_channels=num_channels)


async def _null_columns(served: _Served) -> None:
    """Columns of the null model, beside an echo of messages of the same size, one after the other."""
    bench, client, number = served.bench, served.client, 4096
    sessions = await client.open_sessions(NULL_MODEL, number)
    tokens = tokens_for(_NUM_TOKENS, number)
    result = await client.step_many(sessions, tokens[0])
    assert result.next_token is not None
    if (result.next_token != tokens[0] ^ 1).any():
        raise CheckError("the null model's answers are not those to what was sent")
    num_bytes = 36 * number  # of each session a request, a handle, a position, an acknowledgement and a token

    async def limit() -> float:
        return number * (await _echo_sample(bench, served.echo, 1, num_bytes)).tokens_per_second

    size = {"sessions a call": number}
    row = Row("E1", "step_many, null model", size, "tokens/s", f"echo of {num_bytes:,} bytes, a stream")
    row.goal = Goal(">=", 1_000_000, of="ours")
    await served.alternate(row, sessions, step_columns(client, sessions, tokens), limit)


async def _echo_sample(bench: Bench, echo: PeerServer, num_streams: int, num_bytes: int = 40) -> Sample:
    async with Exchanger(echo.target, ECHO_STREAM, num_streams) as exchanger:
        return await measure(exchanger, [[bytes(num_bytes)]] * num_streams, bench.effort.seconds, echo.pid)
