"""S1: hundreds of thousands of open sessions: what each takes, and whether the others notice."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench.frames import open_many, run_frame
from bench.methods import STREAM
from bench.raw import Exchanger
from bench.rows import Goal, Row
from bench.running import Bench, check_next_tokens, tokens_for
from bench.samples import Sample, cpu_seconds, resident_bytes
from cellserve import AsyncClient
from cellserve.v1.stream_pb2 import StreamResponse
from demo.server_process import ServerProcess

__all__ = ["many_sessions"]

_HIDDEN_SIZE: Final = 128
_OPEN_AT_ONCE: Final = 10_000
_STEP_AT_ONCE: Final = 1000  # sessions of a frame
_NUM_FRAMES: Final = 64
_ALLOWED_BYTES: Final = 400  # of a session beside its state


@dataclass(frozen=True, slots=True)
class _Sessions:
    """Sessions on one stream, each of which has made a step. open_seconds: what opening them took."""

    exchanger: Exchanger
    pid: int
    handles: list[int]
    open_seconds: float

    async def sample(self, seconds: float) -> Sample:
        """Steps of 1,000 sessions at a time, chosen at random."""
        random = np.random.default_rng(0)
        handles, tokens = np.array(self.handles, np.uint64), tokens_for(_NUM_FRAMES, _STEP_AT_ONCE)
        frames = [
            run_frame(random.choice(handles, _STEP_AT_ONCE, replace=False).tolist(), row[:, None]) for row in tokens
        ]
        latencies: list[float] = []
        client_cpu, server_cpu = time.process_time(), cpu_seconds(self.pid)
        begin = time.perf_counter()
        for frame in itertools.cycle(frames):
            sent = time.perf_counter()
            await _step(self.exchanger, frame)
            latencies.append(time.perf_counter() - sent)
            if (elapsed := time.perf_counter() - begin) >= seconds:
                break
        num_tokens = _STEP_AT_ONCE * len(latencies)
        p50, p99 = np.quantile(latencies, [0.5, 0.99])
        return Sample(
            tokens_per_second=num_tokens / elapsed,
            p50_seconds=float(p50),
            p99_seconds=float(p99),
            client_cpu_microseconds=1e6 * (time.process_time() - client_cpu) / num_tokens,
            server_cpu_microseconds=1e6 * (cpu_seconds(self.pid) - server_cpu) / num_tokens,
        )


async def many_sessions(bench: Bench) -> None:
    """S1: resident bytes of a session whose state is on the device, and steps of some among many, beside 1,000."""
    bench.model(_HIDDEN_SIZE)
    numbers = [10_000] if bench.effort.is_quick else [10_000, 100_000, 1_000_000]
    with bench.server() as few_server:
        async with AsyncClient(few_server.target) as client:
            checked = await check_next_tokens(bench, client, _HIDDEN_SIZE)
        async with _opened(few_server, _STEP_AT_ONCE) as few:
            for number in numbers:
                room = number + _STEP_AT_ONCE
                with bench.server(f"--max-sessions={room}", f"--max-slots={room}") as server:
                    await _measure(bench, server, number, few, checked)


async def _measure(bench: Bench, server: ServerProcess, number: int, few: _Sessions, checked: str) -> None:
    seconds = bench.effort.seconds
    size = {"H": _HIDDEN_SIZE, "sessions": number}
    bench.tell(f"S1: {number:,} sessions")
    async with _opened(server, number) as many:
        state_bytes = 4 * _HIDDEN_SIZE
        row = Row("S1", "resident memory of a session", size, "bytes", "its state", checked=checked)
        row.goal = Goal("<=", state_bytes + _ALLOWED_BYTES, of="ours")
        # Columns that are allocated and touched at the start are of the sessions, too; the rest the other server has.
        more_bytes = resident_bytes(server.pid) - resident_bytes(few.pid)
        row.add(more_bytes / (number - _STEP_AT_ONCE), state_bytes, opened_per_s=number / many.open_seconds)
        bench.add(row)

        async def limit() -> float:
            return (await few.sample(seconds)).tokens_per_second

        row = Row("S1", "steps of 1,000 of them at a time", size, "tokens/s", "1,000 sessions open", Goal(">=", 0.9))
        row.checked = checked
        await bench.alternate(row, lambda: many.sample(seconds), limit)


@asynccontextmanager
async def _opened(server: ServerProcess, number: int) -> AsyncIterator[_Sessions]:
    async with Exchanger(server.target, STREAM, 1) as exchanger:
        handles: list[int] = []
        open_seconds = 0.0
        while len(handles) < number:
            first = len(handles)
            ids = [f"session-{index:012}" for index in range(first, min(first + _OPEN_AT_ONCE, number))]
            begin = time.perf_counter()
            opened = await open_many(exchanger, f"gru{_HIDDEN_SIZE}", ids)
            open_seconds += time.perf_counter() - begin
            for start in range(0, len(opened), _STEP_AT_ONCE):
                part = opened[start : start + _STEP_AT_ONCE]
                await _step(exchanger, run_frame(part, np.full((len(part), 1), 7), wants_outputs=False), len(part))
            handles += opened
        yield _Sessions(exchanger, server.pid, handles, open_seconds)


async def _step(exchanger: Exchanger, frame: bytes, number: int = _STEP_AT_ONCE) -> None:
    """One run of each of so many sessions; their answers come in as many messages as there were ticks."""
    (call,) = exchanger.calls
    await call.write(frame)
    while number:
        answer = await call.read()
        assert isinstance(answer, bytes), "the server has ended the stream"
        for event in StreamResponse.FromString(answer).events:
            assert event.WhichOneof("event") == "answers", event
            number -= len(event.answers.requests)
