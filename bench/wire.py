"""W1 and W2: the service with a model that computes nothing, beside a raw echo; and many tokens in a message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.frames import is_last, next_tokens, open_each, run_frame, step_message, step_next_tokens
from bench.methods import ECHO_STREAM, ECHO_UNARY, NULL_MODEL, STEP, STREAM
from bench.processes import PeerServer, echo_server
from bench.raw import Caller, Exchanger, UnaryCaller, measure
from bench.rows import Goal, Row
from bench.running import Bench, CheckError, check_next_tokens, tokens_for
from bench.samples import Sample
from cellserve import AsyncClient
from demo.server_process import ServerProcess

__all__ = ["Streams", "beside_echo", "echo_rate", "open_streams", "packing", "wire"]

_PACKED_STREAMS: Final = 64
_NUM_FRAMES: Final = 16  # prepared for each stream
_WIRE_GOAL: Final = Goal(">=", 0.85)
_CHECKED_NULL: Final = "every answer's tokens against what the null model must say"


@dataclass(frozen=True, slots=True)
class Streams:
    """Clients of one server with a session each, and messages ready to be sent."""

    caller: Caller
    messages: list[list[bytes]]
    pid: int
    tokens_per_message: int

    async def sample(self, seconds: float) -> Sample:
        return await measure(self.caller, self.messages, seconds, self.pid, tokens_per_message=self.tokens_per_message)


@asynccontextmanager
async def open_streams(
    server: ServerProcess, model: str, num_streams: int, *, run_tokens: int = 1, num_channels: int = 1
) -> AsyncIterator[Streams]:
    """Streams of the service with a session on each. The null model's answers are checked."""
    tokens = tokens_for(_NUM_FRAMES * run_tokens, num_streams).T.reshape(num_streams, _NUM_FRAMES, run_tokens)
    # A long run may be answered in several messages, one token never is.
    parts = is_last if run_tokens > 1 else None
    async with Exchanger(server.target, STREAM, num_streams, num_channels=num_channels, is_last=parts) as exchanger:
        handles = await open_each(exchanger, model)
        messages = [
            [run_frame([handle], frame[None]) for frame in column]
            for handle, column in zip(handles, tokens, strict=True)
        ]
        answers = await exchanger.ask([column[0] for column in messages])
        if model == NULL_MODEL:
            _check_null([next_tokens(answer) for answer in answers], tokens[:, 0].tolist())
        yield Streams(exchanger, messages, server.pid, run_tokens)


@asynccontextmanager
async def _open_unary(server: ServerProcess, client: AsyncClient, num_callers: int) -> AsyncIterator[Streams]:
    sessions = await client.open_sessions(NULL_MODEL, num_callers)
    tokens = tokens_for(_NUM_FRAMES, num_callers).T
    messages = [
        [step_message(session.id, [token]) for token in column]
        for session, column in zip(sessions, tokens.tolist(), strict=True)
    ]
    async with UnaryCaller(server.target, STEP, num_callers) as caller:
        answers = await caller.ask([column[0] for column in messages])
        _check_null([step_next_tokens(answer) for answer in answers], tokens[:, :1].tolist())
        yield Streams(caller, messages, server.pid, 1)


@asynccontextmanager
async def _open_echo(echo: PeerServer, like: Streams, *, num_channels: int = 1) -> AsyncIterator[Streams]:
    """The echo with messages of the same number and size."""
    messages = [[bytes(len(message)) for message in column] for column in like.messages]
    caller: Caller
    if isinstance(like.caller, UnaryCaller):
        caller = UnaryCaller(echo.target, ECHO_UNARY, len(messages))
    else:
        caller = Exchanger(echo.target, ECHO_STREAM, len(messages), num_channels=num_channels)
    async with caller:
        answers = await caller.ask([column[0] for column in messages])
        if answers != [[column[0]] for column in messages]:
            raise CheckError("the echo does not echo")
        yield Streams(caller, messages, echo.pid, like.tokens_per_message)


async def echo_rate(bench: Bench, echo: PeerServer, num_streams: int, num_bytes: int = 40) -> float:
    """Messages a second of the raw echo."""
    async with Exchanger(echo.target, ECHO_STREAM, num_streams) as exchanger:
        messages = [[bytes(num_bytes)]] * num_streams
        return (await measure(exchanger, messages, bench.effort.seconds, echo.pid)).tokens_per_second


async def beside_echo(bench: Bench, row: Row, echo: PeerServer, streams: Streams, *, num_channels: int = 1) -> None:
    """Sample streams of the service and as many of the echo in turns."""
    seconds = bench.effort.seconds
    async with _open_echo(echo, streams, num_channels=num_channels) as echoes:

        async def limit() -> float:
            return (await echoes.sample(seconds)).tokens_per_second

        await bench.alternate(row, lambda: streams.sample(seconds), limit)


async def wire(bench: Bench) -> None:
    """W1: messages a second of the service with the null model, beside an echo of as many bytes."""
    sizes = [(1, 1), (64, 1), (256, 1), (1024, 1), (64, 54), (64, 1000)]  # streams, tokens: 40 B, 256 B, 4 KiB
    callers = [1, 64]
    if bench.effort.is_quick:
        sizes, callers = [(64, 1)], [64]
    with echo_server() as echo, bench.null_server() as server:
        for num_streams, run_tokens in sizes:
            async with open_streams(server, NULL_MODEL, num_streams, run_tokens=run_tokens) as streams:
                num_bytes = len(streams.messages[0][0])
                row = Row(
                    "W1",
                    "null model, messages on streams of their own",
                    {"streams": num_streams, "bytes": num_bytes},
                    "tokens/s",
                    "raw grpc.aio echo of the same",
                    _WIRE_GOAL if run_tokens == 1 and num_streams >= 64 else None,
                    _CHECKED_NULL,
                )
                await beside_echo(bench, row, echo, streams)
        async with AsyncClient(server.target) as client:
            for num_callers in callers:
                async with _open_unary(server, client, num_callers) as calls:
                    size = {"callers": num_callers, "bytes": len(calls.messages[0][0])}
                    row = Row("W1", "null model, unary Step", size, "tokens/s", "raw grpc.aio unary echo")
                    row.goal, row.checked = _WIRE_GOAL, _CHECKED_NULL
                    await beside_echo(bench, row, echo, calls)


async def packing(bench: Bench) -> None:
    """W2: k tokens in a message, beside k times the rate of one; and a GRU beside the nearer of its two limits."""
    lengths = [16, 256] if bench.effort.is_quick else [16, 64, 256, 1024]
    hidden_sizes = (256,) if bench.effort.is_quick else (256, 512)
    models = {hidden_size: bench.model(hidden_size) for hidden_size in hidden_sizes}
    with bench.null_server() as null, bench.server() as server:
        for run_tokens in lengths:
            async with (
                open_streams(null, NULL_MODEL, _PACKED_STREAMS) as single,
                open_streams(null, NULL_MODEL, _PACKED_STREAMS, run_tokens=run_tokens) as packed,
            ):
                await _packed_null(bench, single, packed)
                for hidden_size, model in models.items():
                    await _packed_gru(bench, server, packed, model, hidden_size)


async def _packed_null(bench: Bench, single: Streams, packed: Streams) -> None:
    seconds, run_tokens = bench.effort.seconds, packed.tokens_per_message

    async def limit() -> float:
        return run_tokens * (await single.sample(seconds)).tokens_per_second

    size = {"streams": _PACKED_STREAMS, "tokens a message": run_tokens}
    row = Row("W2", "null model, packed", size, "tokens/s", "one token a message, times so many")
    row.goal, row.checked = Goal(">=", 0.7) if run_tokens <= 256 else None, _CHECKED_NULL
    await bench.alternate(row, lambda: packed.sample(seconds), limit)


async def _packed_gru(bench: Bench, server: ServerProcess, null: Streams, model: Path, hidden_size: int) -> None:
    seconds, run_tokens = bench.effort.seconds, null.tokens_per_message
    async with AsyncClient(server.target) as client:
        checked = await check_next_tokens(bench, client, hidden_size)

    async def limit() -> float:
        wire_rate = (await null.sample(seconds)).tokens_per_second
        return min(wire_rate, await bench.step_rate(model, _PACKED_STREAMS))

    size = {"H": hidden_size, "streams": _PACKED_STREAMS, "tokens a message": run_tokens}
    row = Row("W2", "gru, packed", size, "tokens/s", "the slower of null model and reference step")
    row.goal, row.checked = Goal(">=", 0.8), checked
    async with open_streams(server, model.parent.name, _PACKED_STREAMS, run_tokens=run_tokens) as streams:
        await bench.alternate(row, lambda: streams.sample(seconds), limit)


def _check_null(found: list[list[int]], sent: list[list[int]]) -> None:
    if found != (np.array(sent) ^ 1).tolist():
        raise CheckError("the null model's answers are not those to what was sent")
