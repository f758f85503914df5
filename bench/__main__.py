"""`make bench`: the service and its cells beside their limits and peers, sampled in turns in the same run.

Prints a table, and writes every sample as JSON and the plots as SVG. All benchmarks together take about an hour;
--quick takes some minutes and gives rough figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.float64 import WrongAnswerError
from bench.plots import draw
from bench.processes import echo_server
from bench.report import machine, print_rows, write_json
from bench.rows import Row
from bench.running import Bench, CheckError, Effort
from bench.suite import BENCHMARKS, run
from bench.wire import echo_rate
from cellserve.load import run_precisely
from demo.server_process import ServerError

_QUICK = Effort(seconds=0.4, kernel_seconds=0.03, turns=3, pairs=4, is_quick=True)
_FULL = Effort(seconds=2.0, kernel_seconds=0.15, turns=5, pairs=20, is_quick=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 where something does not answer what it must, however fast."""
    listed = "\n".join(f"  {number}  {what}" for number, (what, _) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="short samples of fewer sizes")
    parser.add_argument("--only", metavar="ID,ID", default="", help="some benchmarks, e.g. K1,E1")
    parser.add_argument("--seconds", type=float, metavar="S", help="of a sample of the service")
    parser.add_argument("--turns", type=int, metavar="N", help="samples of each")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs where processor times are compared")
    parser.add_argument("--hidden", type=_numbers, metavar="H,H", default=(), help="the only hidden sizes of K1")
    parser.add_argument("--batch", type=_numbers, metavar="B,B", default=(), help="the only batch sizes of K1")
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="for all processes together (default 2)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE", help="for every sample")
    parser.add_argument("--figures", type=Path, metavar="DIRECTORY", help="for the plots (default: beside the JSON)")
    parser.add_argument("server", nargs="*", metavar="SERVER_OPTION", help="behind --: options of cellserve-server")
    options = parser.parse_args(arguments)
    ids = [number for number in options.only.upper().split(",") if number] or list(BENCHMARKS)
    unknown = [number for number in ids if number not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}")
    usual = _QUICK if options.quick else _FULL
    effort = Effort(
        seconds=options.seconds or usual.seconds,
        kernel_seconds=min(usual.kernel_seconds, options.seconds or usual.kernel_seconds),
        turns=options.turns or usual.turns,
        pairs=options.pairs or usual.pairs,
        is_quick=options.quick,
        hidden_sizes=options.hidden,
        batch_sizes=options.batch,
    )
    # Inherited by every process started from here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    rows: list[Row] = []
    try:
        run_precisely(_run(console, effort, ids, options.server, options.json, rows))
    except (CheckError, ServerError, WrongAnswerError) as error:
        Console(stderr=True, highlight=False).print(f"The benchmark failed: {error}", markup=False)
        return 1
    print_rows(console, rows)
    figures = draw(options.json, options.figures or options.json.parent)
    console.print(f"written: {', '.join(map(str, [options.json, *figures]))}", markup=False)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


async def _run(
    console: Console, effort: Effort, ids: Sequence[str], server_options: list[str], file: Path, rows: list[Row]
) -> None:
    def tell(line: str) -> None:
        console.print(line, style="dim", markup=False)

    def add(row: Row) -> None:
        rows.append(row)
        write_json(file, constants, rows)

    with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as directory:
        bench = Bench(Path(directory), effort, add, tell, server_options)
        try:
            constants = machine(len(os.sched_getaffinity(0))) | await _constants(bench)
            for name, value in constants.items():
                console.print(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}", markup=False)
            console.print(f"load average {os.getloadavg()[0]:.2f}")
            await run(bench, ids)
        finally:
            bench.close()


async def _constants(bench: Bench) -> dict[str, object]:
    """What this machine can do."""
    constants: dict[str, object] = await bench.cells.call("machine_constants", bench.effort.kernel_seconds)
    with echo_server() as echo:
        constants["echo_messages_per_second_256_streams"] = await echo_rate(bench, echo, 256)
        constants["echo_messages_per_second_1_stream"] = await echo_rate(bench, echo, 1)
    return constants


if __name__ == "__main__":
    raise SystemExit(main())
