"""`make bench-gpu`: the time of one step of every cell on a GPU, beside its limits measured in the same run.

Needs torch, triton, numpy and safetensors alone. Every cell is held against float64 before it is timed. The
limits: the replay of a graph of two kernels that do nothing, the same products by torch in bfloat16, and the
roof, which is the slower of the step's arithmetic at the rate of a large product and its bytes at the rate of a
large copy. The peers: torch's own cells called eagerly, and cuDNN's layer for one token.
Symbols: B rows, H hidden size, W its padded width, G row blocks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import triton
from torch import nn

from bench.gpu_checks import (
    CHECKED_STEPS,
    VOCABULARY,
    CheckError,
    check_determinism,
    check_run,
    check_steps,
    make_network,
    make_run,
    set_rows,
)
from cellserve_model.cells import CELLS
from cellserve_model.cuda.graphs import capture_in_one_pool

__all__ = ["main"]

_RUN_STEPS = 32
_MOST_RUN_ROWS = 1024
_SAMPLE_MICROSECONDS = 5000.0
_MAX_REPEATS = 500
_PEERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "vanilla_rnn": (nn.RNNCell, nn.RNN),
    "gru": (nn.GRUCell, nn.GRU),
    "gru_reset_after": (nn.GRUCell, nn.GRU),
    "lstm": (nn.LSTMCell, nn.LSTM),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds: the median of the rounds and the quartiles between which the middle half lies."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One cell at one shape. timings: ours, empty_graph, product and, where torch has the cell, eager and cudnn."""

    cell: str
    hidden_size: int
    num_rows: int
    error: float
    timings: dict[str, Timing]
    roof: float  # microseconds

    @property
    def ours(self) -> float:
        return self.timings["ours"].median


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time and print; returns 1 where a check fails, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    parser.add_argument("--hidden", nargs="+", type=int, default=[256, 512, 1024, 2048], metavar="H")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 1024, 16384], metavar="B")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each, in turns (default 7)")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that compile beforehand"
    )
    parser.add_argument("--check", action="store_true", help="only check, also through Triton's interpreter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, not to the output")
    options = parser.parse_args(arguments)
    if not options.check and not torch.cuda.is_available():
        print("bench-gpu needs a GPU that torch sees; --check alone runs without one", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes = list(itertools.product(options.hidden, options.cells))
    try:
        with torch.inference_mode():
            if options.check:
                for hidden_size, cell in shapes:
                    error = check_steps(cell, hidden_size, device)
                    check_determinism(cell, hidden_size, options.rows, device)
                    check_run(cell, hidden_size, device)
                    print(f"{cell} H={hidden_size}: largest error {error:.1e} after {CHECKED_STEPS} steps")
                return 0
            compile_beforehand(shapes, options.rows, options.jobs)
            report = _measure(shapes, options.rows, options.rounds, device)
    except CheckError as error:
        print(f"The benchmark failed: {error}", file=sys.stderr)
        return 1
    if options.json is None:
        print(json.dumps(report))
    else:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def compile_beforehand(shapes: Sequence[tuple[int, str]], sizes: Sequence[int], num_jobs: int) -> None:
    """Fill Triton's cache on disk from several processes: one after another, some 200 kernels take many minutes."""
    with ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_launch_once, cell, hidden_size, sizes) for hidden_size, cell in shapes]:
            done.result()


def _launch_once(cell: str, hidden_size: int, sizes: Sequence[int]) -> None:
    device = torch.device("cuda", 0)
    with torch.inference_mode():
        check_steps(cell, hidden_size, device)
        check_determinism(cell, hidden_size, sizes[:1], device)
        check_run(cell, hidden_size, device)
        for num_rows in sizes:
            network = make_network(cell, hidden_size, num_rows, device)
            tokens = torch.zeros(num_rows, _RUN_STEPS, dtype=torch.int32, device=device)
            bucket = set_rows(network, torch.arange(1, num_rows + 1, device=device), tokens[:, 0], is_odd=False)
            network.launch_step(bucket)
            if num_rows <= _MOST_RUN_ROWS:
                network.launch_run(*make_run(network, bucket, tokens))
        torch.cuda.synchronize()


def _measure(
    shapes: Sequence[tuple[int, str]], sizes: Sequence[int], rounds: int, device: torch.device
) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    print(f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}")
    bandwidth, rate = _copy_bandwidth(device, rounds), _product_rate(device, rounds)
    print(f"large copy {bandwidth * 1e-6:.2f} TB/s, bfloat16 product of 8,192^3 {rate * 1e-6:.0f} TFLOP/s")
    rows = []
    print(table_header())
    for hidden_size, cell in shapes:
        error = check_steps(cell, hidden_size, device)
        check_determinism(cell, hidden_size, sizes, device)
        check_run(cell, hidden_size, device)
        for num_rows in sizes:
            row = _measure_row(cell, hidden_size, num_rows, rounds, device, error, bandwidth, rate)
            rows.append(row)
            print(table_line(row), flush=True)
    print("\nGoals:")
    for line in goal_lines(rows):
        print(line)
    runs = []
    print(f"\nRuns of {_RUN_STEPS} tokens, microseconds a step: in one launch, as {_RUN_STEPS} replays")
    for hidden_size, cell in shapes:
        for num_rows in (size for size in sizes if size <= _MOST_RUN_ROWS):
            timings = _measure_run(cell, hidden_size, num_rows, rounds, device)
            runs.append({"cell": cell, "hidden_size": hidden_size, "num_rows": num_rows} | timings)
            print(
                f"{cell:16}{hidden_size:6}{num_rows:7}{timings['one_launch']:10.2f}{timings['replays']:10.2f}"
                f"{timings['replays'] / timings['one_launch']:7.2f}x",
                flush=True,
            )
    return {
        "device": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_terabytes_per_second": bandwidth * 1e-6,
        "product_teraflops": rate * 1e-6,
        "rows": [asdict(row) for row in rows],
        "runs": runs,
    }


def _measure_row(
    cell: str,
    hidden_size: int,
    num_rows: int,
    rounds: int,
    device: torch.device,
    error: float,
    bandwidth: float,
    rate: float,
) -> Row:
    capture = capture_in_one_pool(device)
    network = make_network(cell, hidden_size, num_rows, device)
    generator = torch.Generator().manual_seed(0)
    slots = (torch.randperm(num_rows, generator=generator) + 1).to(device)
    tokens = torch.randint(VOCABULARY, (num_rows,), generator=generator).to(device)
    bucket = set_rows(network, slots, tokens, is_odd=False)
    blocks = network.config.spec.num_blocks
    states = torch.randn(num_rows, hidden_size, device=device, dtype=torch.bfloat16)
    weight = torch.randn(hidden_size, blocks * hidden_size, device=device, dtype=torch.bfloat16)
    product = torch.empty(num_rows, blocks * hidden_size, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        torch.mm(states, weight, out=product)

    contenders: dict[str, Callable[[], object]] = {
        "ours": capture(functools.partial(network.launch_step, bucket)),
        "empty_graph": _empty_graph(device, capture),
        "product": capture(multiply),
    }
    if cell in _PEERS:
        one, layer = _PEERS[cell]
        eager = one(hidden_size, hidden_size, device=device, dtype=torch.bfloat16)
        cudnn = layer(hidden_size, hidden_size, device=device, dtype=torch.bfloat16)
        given = torch.randn_like(states)
        held = (states, states) if cell == "lstm" else states
        stacked = (states[None], states[None]) if cell == "lstm" else states[None]
        contenders["eager"] = lambda: eager(given, held)
        contenders["cudnn"] = lambda: cudnn(given[None], stacked)
    timings = time_in_turns(contenders, rounds)
    return Row(cell, hidden_size, num_rows, error, timings, roof(cell, hidden_size, num_rows, bandwidth, rate))


def roof(cell: str, hidden_size: int, num_rows: int, bandwidth: float, rate: float) -> float:
    """The least microseconds of a step: its multiply-adds at `rate` (FLOP/us), its bytes at `bandwidth` (bytes/us).

    Bytes: the weights, each row's state in and out in float32, and its row of the table.
    """
    spec = CELLS[cell]
    weight_numbers = spec.num_blocks * hidden_size**2
    state_bytes = 8 * spec.state_vectors * hidden_size
    num_bytes = 2 * weight_numbers + num_rows * (state_bytes + 2 * spec.num_blocks * hidden_size + 12)
    return max(2 * num_rows * weight_numbers / rate, num_bytes / bandwidth)


def _measure_run(cell: str, hidden_size: int, num_rows: int, rounds: int, device: torch.device) -> dict[str, float]:
    network = make_network(cell, hidden_size, num_rows, device)
    tokens = torch.zeros(num_rows, _RUN_STEPS, dtype=torch.int32, device=device)
    bucket = set_rows(network, torch.arange(1, num_rows + 1, device=device), tokens[:, 0], is_odd=False)
    step = capture_in_one_pool(device)(functools.partial(network.launch_step, bucket))
    run = make_run(network, bucket, tokens)

    def replays() -> None:
        for _ in range(_RUN_STEPS):
            step()

    timings = time_in_turns({"one_launch": functools.partial(network.launch_run, *run), "replays": replays}, rounds)
    return {name: timing.median / _RUN_STEPS for name, timing in timings.items()}


def time_in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """The device's microseconds of one call of each, sampled in turns."""
    repeats = {}
    for name, call in contenders.items():
        _sample(call, 3)
        repeats[name] = int(min(_MAX_REPEATS, max(3, _SAMPLE_MICROSECONDS / _sample(call, 3))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_sample(call, repeats[name]))
    return {
        name: Timing(*(float(value) for value in np.quantile(values, [0.5, 0.25, 0.75])))
        for name, values in samples.items()
    }


def _sample(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / repeats


def _empty_graph(
    device: torch.device, capture: Callable[[Callable[[], None]], Callable[[], None]]
) -> Callable[[], None]:
    """A graph of two kernels, each over one number: what launching a step costs by itself."""
    number = torch.zeros(1, device=device)

    def launch() -> None:
        number.zero_()
        number.add_(1)

    return capture(launch)


def _copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a microsecond, read and written, of a copy of 1 GiB."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / time_in_turns({"copy": lambda: target.copy_(source)}, rounds)["copy"].median


def _product_rate(device: torch.device, rounds: int) -> float:
    """FLOP a microsecond of a bfloat16 product of 8,192^3."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * 8192**3 / time_in_turns({"product": lambda: torch.mm(left, right, out=out)}, rounds)["product"].median


def table_header() -> str:
    return (
        f"{'cell':16}{'H':>6}{'B':>7}{'ours us':>10}{'middle half':>17}{'M tok/s':>9}{'roof':>9}{'empty':>7}"
        f"{'product':>9}{'eager':>9}{'cuDNN':>9}{'ours/(empty+roof)':>19}{'product/ours':>14}{'error':>9}"
    )


def table_line(row: Row) -> str:
    """A row as printed; times in microseconds, a dash where torch has no such cell."""
    ours, empty, product = (row.timings[name] for name in ("ours", "empty_graph", "product"))
    eager, cudnn = (f"{row.timings[name].median:.1f}" if name in row.timings else "-" for name in ("eager", "cudnn"))
    return (
        f"{row.cell:16}{row.hidden_size:6}{row.num_rows:7}{ours.median:10.2f}{f'{ours.low:.2f}-{ours.high:.2f}':>17}"
        f"{row.num_rows / ours.median:9.2f}{row.roof:9.2f}{empty.median:7.2f}{product.median:9.2f}{eager:>9}{cudnn:>9}"
        f"{ours.median / (empty.median + row.roof):19.2f}{product.median / ours.median:14.2f}{row.error:9.1e}"
    )


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """What issue 4 and performance.md ask of K2, and whether it is met."""
    lines = []

    def judge(row: Row, what: str, value: float, goal: float, *, at_most: bool) -> None:
        is_met = value <= goal if at_most else value >= goal
        name = f"{row.cell} H={row.hidden_size} B={row.num_rows}"
        lines.append(
            f"{'met   ' if is_met else 'MISSED'} {name}: {what} {value:.2f}, goal {'<=' if at_most else '>='} {goal}"
        )

    by_shape = {(row.cell, row.hidden_size, row.num_rows): row for row in rows}
    for row in rows:
        product, empty = row.timings["product"].median, row.timings["empty_graph"].median
        if row.num_rows <= 64:
            judge(row, "ours / (empty graph + roof)", row.ours / (empty + row.roof), 1.5, at_most=True)
        if row.num_rows <= 64 and "eager" in row.timings:
            judge(row, "eager / ours", row.timings["eager"].median / row.ours, 5.0, at_most=False)
        if row.num_rows >= 1024 and row.hidden_size >= 1024:
            judge(row, "product / ours", product / row.ours, 0.6, at_most=False)
        if row.cell == "gru_reset_after":
            judge(row, "cuDNN / ours", row.timings["cudnn"].median / row.ours, 1.0, at_most=False)
            before = by_shape.get(("gru", row.hidden_size, row.num_rows))
            if before is not None and row.num_rows >= 1024 and row.hidden_size >= 1024:
                judge(before, "reset-before / reset-after", before.ours / row.ours, 1.4, at_most=True)
    return lines


if __name__ == "__main__":
    sys.exit(main())
