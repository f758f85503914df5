"""Where the front end should live: in the engine's process, beside it, or several beside it. `python -m bench.workers`.

Servers of each kind run at the same time and are sampled in turns. CPU time is that of all processes, client included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from grpc import aio
from rich.console import Console
from rich.table import Table

from bench.loops import single_steps
from cellserve import AsyncClient
from cellserve.v1.stream_pb2 import Command, OpenCommand, RunCommand, StreamRequest, StreamResponse
from cellserve.v1.values_pb2 import OutputAt, OutputRequest
from demo.server_process import ServerProcess
from tests.support.models import write_tiny_model

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STREAM: Final = "/cellserve.v1.SessionService/Stream"
_NUM_SESSIONS: Final = 256
_NUM_CONNECTIONS: Final = 8
_CALIBRATION_STEPS: Final = 8

Load = Callable[[int], Awaitable[list[float]]]  # advances each session by so many steps; latencies


@dataclass(slots=True)
class Contender:
    """One kind of server. cpu_microseconds: a token's, of the engine's process and of all processes."""

    name: str
    server: ServerProcess
    tokens_per_second: list[float] = field(default_factory=list)
    p50_seconds: list[float] = field(default_factory=list)
    engine_cpu_microseconds: list[float] = field(default_factory=list)
    cpu_microseconds: list[float] = field(default_factory=list)

    async def sample(self, load: Load, num_steps: int, num_sessions: int) -> None:
        pids = [self.server.pid, *_children(self.server.pid)]
        before = [_cpu_seconds(pid) for pid in pids]
        client_before, begin = time.process_time(), time.perf_counter()
        latencies = await load(num_steps)
        seconds = time.perf_counter() - begin
        client = time.process_time() - client_before
        spent = [_cpu_seconds(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
        num_tokens = num_steps * num_sessions
        self.tokens_per_second.append(num_tokens / seconds)
        self.p50_seconds.append(float(np.median(latencies)))
        self.engine_cpu_microseconds.append(1e6 * spent[0] / num_tokens)
        self.cpu_microseconds.append(1e6 * (client + sum(spent)) / num_tokens)

    def clear(self) -> None:
        for samples in (
            self.tokens_per_second,
            self.p50_seconds,
            self.engine_cpu_microseconds,
            self.cpu_microseconds,
        ):
            samples.clear()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each (default 7)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of a sample (default 2)")
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="for all processes together (default 2)")
    parser.add_argument("--workers", type=int, nargs="*", default=[2], metavar="N", help="besides one (default 2)")
    parser.add_argument("--only", metavar="WORDS", default="", help="loads with these words in their name")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"{len(os.sched_getaffinity(0))} cores; load {os.getloadavg()[0]:.2f}")
    asyncio.run(_run(console, options))


async def _run(console: Console, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as directory, ExitStack() as stack:
        models = Path(directory) / "models"
        for hidden_size in (128, 512):
            folder = models / f"gru{hidden_size}" / "1"
            write_tiny_model(folder, "gru", hidden_size=hidden_size, vocab_size=256, output_size=256)

        def server(name: str, *arguments: str, program: Sequence[str] = ("-m", "cellserve_service")) -> Contender:
            process = ServerProcess(
                Path(directory) / f"{name}.log", [f"--models={models}", "--num-threads=1", *arguments], program
            )
            return Contender(name, stack.enter_context(process))

        contenders = [
            server("in the engine's process"),
            server("one beside", program=("-m", "bench.one_beside")),
            *(server(f"{number} beside", f"--workers={number}") for number in options.workers),
        ]
        for name, model, num_sessions, make in (
            ("256 coroutines, H=512", "gru512", _NUM_SESSIONS, _coroutines),
            ("256 coroutines, H=128", "gru128", _NUM_SESSIONS, _coroutines),
            ("256 streams, H=128", "gru128", _NUM_SESSIONS, _streams),
            ("a lone session, H=128", "gru128", 1, _coroutines),
        ):
            if options.only not in name:
                continue
            async with AsyncExitStack() as connected:
                loads = [
                    await make(connected, contender.server.target, model, num_sessions) for contender in contenders
                ]
                await _compare(contenders, loads, num_sessions, options)
            _print(console, name, contenders)


async def _compare(
    contenders: Sequence[Contender], loads: Sequence[Load], num_sessions: int, options: argparse.Namespace
) -> None:
    numbers = []
    for contender, load in zip(contenders, loads, strict=True):
        num_steps = _CALIBRATION_STEPS
        for seconds in (options.seconds / 10, options.seconds):
            contender.clear()
            await contender.sample(load, num_steps, num_sessions)
            num_steps = max(_CALIBRATION_STEPS, round(contender.tokens_per_second[0] * seconds / num_sessions))
        contender.clear()
        numbers.append(num_steps)
    for _ in range(options.rounds):
        for contender, load, num_steps in zip(contenders, loads, numbers, strict=True):
            await contender.sample(load, num_steps, num_sessions)


async def _coroutines(connected: AsyncExitStack, target: str, model: str, num_sessions: int) -> Load:
    """A coroutine of one client for each session, which awaits one token after the other."""
    client = await connected.enter_async_context(AsyncClient(target))
    sessions = await client.open_sessions(model, num_sessions)
    return single_steps(sessions, np.random.default_rng(1).integers(0, 256, (64, num_sessions)))


async def _streams(connected: AsyncExitStack, target: str, model: str, num_sessions: int) -> Load:
    """A stream of its own for each session, a message for each token; over several connections."""
    wanted = OutputRequest(at=OutputAt.OUTPUT_AT_LAST, next_token=True)
    streams: list[tuple[aio.StreamStreamCall[bytes, bytes], bytes]] = []
    channels = [
        await connected.enter_async_context(aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]))
        for _ in range(_NUM_CONNECTIONS)
    ]
    for number in range(num_sessions):
        open_stream: aio.StreamStreamMultiCallable[bytes, bytes] = channels[number % len(channels)].stream_stream(
            _STREAM
        )
        stream = open_stream()
        opening = OpenCommand(requests=[1], model=model)
        await stream.write(StreamRequest(commands=[Command(open=opening)]).SerializeToString())
        answer = await stream.read()
        assert isinstance(answer, bytes)
        [handle] = StreamResponse.FromString(answer).events[0].opened.handles
        # It has no position, so the same bytes can be sent again and again.
        run = RunCommand(requests=[2], handles=[handle], tokens=[number % 256], outputs=wanted)
        streams.append((stream, StreamRequest(commands=[Command(run=run)]).SerializeToString()))

    async def follow(stream: aio.StreamStreamCall[bytes, bytes], frame: bytes, num_steps: int) -> list[float]:
        latencies = []
        for _ in range(num_steps):
            begin = time.perf_counter()
            await stream.write(frame)
            assert isinstance(await stream.read(), bytes)
            latencies.append(time.perf_counter() - begin)
        return latencies

    async def run_all(num_steps: int) -> list[float]:
        latencies = await asyncio.gather(*(follow(stream, frame, num_steps) for stream, frame in streams))
        return [latency for of_one in latencies for latency in of_one]

    return run_all


def _print(console: Console, name: str, contenders: Sequence[Contender]) -> None:
    table = Table(title=name, title_justify="left")
    columns = (
        "front end",
        "tokens/s",
        "of the first",
        "quartiles",
        "p50 ms",
        "CPU us a token",
        "engine's part",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "front end" else "right")
    first = contenders[0]
    for contender in contenders:
        ratios = [
            ours / theirs for ours, theirs in zip(contender.tokens_per_second, first.tokens_per_second, strict=True)
        ]
        low, high = np.quantile(ratios, [0.25, 0.75])
        table.add_row(
            contender.name,
            f"{np.median(contender.tokens_per_second):,.0f}",
            f"{np.median(ratios):.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{1000 * np.median(contender.p50_seconds):.2f}",
            f"{np.median(contender.cpu_microseconds):.1f}",
            f"{np.median(contender.engine_cpu_microseconds):.1f}",
        )
    console.print(table)


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def _cpu_seconds(pid: int) -> float:
    """Processor time of another process, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


if __name__ == "__main__":
    main()
