"""`python -m bench.scale N`: memory of N open sessions and what so many cost a step, beside a server with few.

Two servers of one model run side by side, one with room for N sessions, one for a few thousand. Memory of a session is
what the large one has resident more than the small one, by the session, after all have run: so that columns which are
allocated and touched at the start count too. Step rates are sampled in turns, in frames of equally many sessions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

from bench.loops import cpu_seconds
from bench.processes import Worker
from bench.raw_stream import Handles, RawStream
from demo.server_process import ServerProcess

__all__ = ["main"]

_FEW: Final = 4096
_FRAME_SIZES: Final = (1000, 4096)
_FRAMES_UNDER_WAY: Final = 2
_SAMPLE_TOKENS: Final = 80_000
_OPENED_AT_ONCE: Final = 10_000
_GOAL_BYTES: Final = 400
_GOAL_RATE: Final = 0.9


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens_per_second: float
    cpu_microseconds: float  # of the server, a token


@dataclass(slots=True)
class _Sessions:
    """The sessions of one server."""

    stream: RawStream
    pid: int
    random: np.random.Generator
    handles: Handles = field(default_factory=lambda: np.empty(0, np.uint64))
    positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def open(self, model: str, number: int) -> float:
        """Returns sessions opened in a second."""
        begin = time.perf_counter()
        opened = [
            self.stream.open(model, min(_OPENED_AT_ONCE, number - first)) for first in range(0, number, _OPENED_AT_ONCE)
        ]
        seconds = time.perf_counter() - begin
        self.handles = np.concatenate(opened)
        self.positions = np.zeros(number, np.int64)
        return number / seconds

    def step(self, places: npt.NDArray[np.int64], frame_size: int) -> float:
        """One token for each of some sessions, all different in a frame and the next. Returns tokens in a second."""
        begin = time.perf_counter()
        for first in range(0, len(places), frame_size):
            frame = places[first : first + frame_size]
            tokens = self.random.integers(0, 256, len(frame))
            self.stream.send_runs(self.handles[frame], tokens, self.positions[frame])
            self.positions[frame] += 1
            self.stream.read_answers(most_left=(_FRAMES_UNDER_WAY - 1) * frame_size)
        self.stream.read_answers()
        return len(places) / (time.perf_counter() - begin)

    def sample(self, frame_size: int, among: int) -> _Sample:
        """Steps some frames of sessions that are drawn from the first `among`."""
        frames = [self.random.permutation(among)[:frame_size] for _ in range(_SAMPLE_TOKENS // frame_size)]
        cpu = cpu_seconds(self.pid)
        rate = self.step(np.concatenate(frames), frame_size)
        return _Sample(rate, 1e6 * (cpu_seconds(self.pid) - cpu) / (frame_size * len(frames)))


def resident_bytes(pid: int) -> int:
    """What a process has in memory; exact, where VmRSS is behind by some pages of each thread."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"process {pid} does not tell what it has resident")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("sessions", type=int, nargs="?", default=200_000)
    parser.add_argument("--hidden-size", type=int, default=128, metavar="H")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of each rate")
    options = parser.parse_args()
    console = Console(highlight=False)
    reference = Worker("bench.reference")
    with ExitStack() as stack:
        stack.callback(reference.close)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cellserve-scale-")))
        models, model = directory / "models", f"gru{options.hidden_size}"
        reference.call_now("write_models", models, (options.hidden_size,))
        few, many = (_start(stack, directory / f"{number}.log", models, number) for number in (_FEW, options.sessions))
        few.open(model, _FEW)
        few.step(few.random.permutation(_FEW), _FRAME_SIZES[-1])
        opened = many.open(model, options.sessions)
        added = options.sessions - _FEW
        after_opening = (resident_bytes(many.pid) - resident_bytes(few.pid)) / added
        first_steps = many.step(many.random.permutation(options.sessions), _FRAME_SIZES[-1])
        in_all = (resident_bytes(many.pid) - resident_bytes(few.pid)) / added
        state = 4 * options.hidden_size
        console.print(f"{options.sessions:,} sessions opened at {opened:,.0f}/s, first steps at {first_steps:,.0f}/s")
        # A session has a slot from its first step on; until then only the slab's few belong to the difference.
        console.print(f"resident: {after_opening:.0f} bytes a session after opening, {in_all:.0f} after its first step")
        _judge(console, f"beside its state of {state} bytes", in_all - state, _GOAL_BYTES, "at most")
        for frame_size in _FRAME_SIZES:
            pairs = [
                (many.sample(frame_size, options.sessions), few.sample(frame_size, frame_size))
                for _ in range(options.rounds)
            ]
            _judge_rates(console, frame_size, pairs)
    return 0


def _start(stack: ExitStack, log: Path, models: Path, max_sessions: int) -> _Sessions:
    settings = [f"--models={models}", f"--max-sessions={max_sessions}", f"--max-slots={max_sessions}"]
    server = stack.enter_context(ServerProcess(log, [*settings, "--num-threads=1"]))
    return _Sessions(stack.enter_context(RawStream(server.target)), server.pid, np.random.default_rng(0))


def _judge_rates(console: Console, frame_size: int, pairs: Sequence[tuple[_Sample, _Sample]]) -> None:
    rates = [many.tokens_per_second / few.tokens_per_second for many, few in pairs]
    costs = [many.cpu_microseconds / few.cpu_microseconds for many, few in pairs]
    low, high = np.quantile(rates, [0.25, 0.75])
    few_rate = np.median([few.tokens_per_second for _, few in pairs])
    few_cost = np.median([few.cpu_microseconds for _, few in pairs])
    console.print(f"{frame_size} sessions a frame, few: {few_rate:,.0f} tokens/s, {few_cost:.2f} us of the server each")
    console.print(f"  many: {np.median(costs):.3f} of that time, half of the rates at {low:.2f} to {high:.2f}")
    _judge(console, "  rate of many to few", float(np.median(rates)), _GOAL_RATE, "at least")


def _judge(console: Console, name: str, value: float, goal: float, bound: str) -> None:
    reached = value <= goal if bound == "at most" else value >= goal
    console.print(f"{name}: {value:.4g}, {bound} {goal:g}: {'reached' if reached else 'MISSED'}")


if __name__ == "__main__":
    raise SystemExit(main())
