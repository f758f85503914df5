"""The benchmarks by id, in the order in which they run."""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from bench.afternoon import afternoon
from bench.cells import cell_chunks, cell_steps
from bench.closed_loops import closed_loops
from bench.costs import durability, overhead
from bench.fairness import fairness
from bench.generating import generate
from bench.many_sessions import many_sessions
from bench.open_loops import open_loops
from bench.processes import Worker
from bench.rows import Row
from bench.running import Bench
from bench.start import start
from bench.wire import packing, wire

__all__ = ["BENCHMARKS", "run"]


async def _gpu(bench: Bench) -> None:
    """K2: what bench/gpu.py measures, where there is a CUDA device.

    Its function `rows(*, seconds, turns, is_quick)` runs in a process of its own and returns a list of Row.
    """
    if importlib.util.find_spec("bench.gpu") is None:
        bench.tell("K2: there is no bench/gpu.py")
        return
    worker = Worker("bench.gpu")
    try:
        if not await worker.call("has_device"):
            bench.tell("K2: there is no CUDA device; `make bench-gpu` measures it on a machine that has one")
            return
        effort = bench.effort
        rows: Sequence[Row] = await worker.call(
            "rows", seconds=effort.kernel_seconds, turns=effort.turns, is_quick=effort.is_quick
        )
        for row in rows:
            bench.add(row)
    finally:
        worker.close()


BENCHMARKS: Final[dict[str, tuple[str, Callable[[Bench], Awaitable[None]]]]] = {
    "K1": ("one step of every cell on a CPU", cell_steps),
    "K2": ("the same on a GPU", _gpu),
    "K3": ("long runs of the GRUs", cell_chunks),
    "W1": ("messages with a model that computes nothing, beside a raw echo", wire),
    "W2": ("many tokens in a message", packing),
    "E1": ("closed loops", closed_loops),
    "E2": ("requests on a schedule", open_loops),
    "E3": ("beside a server as one writes it in an afternoon", afternoon),
    "E4": ("sampling on the server", generate),
    "F1": ("a bulk client beside interactive ones", fairness),
    "S1": ("up to a million open sessions", many_sessions),
    "O1": ("what metrics and logs cost", overhead),
    "D1": ("what durability costs", durability),
    "C1": ("start to SERVING", start),
}


async def run(bench: Bench, ids: Sequence[str]) -> None:
    """Run benchmarks, one after the other."""
    for number in ids:
        await BENCHMARKS[number][1](bench)
