"""`make bench`: tokens per second of the service beside their limits, sampled in turns in the same run."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench.comparisons import HIDDEN_SIZES, NUM_STREAMS, Bench, CheckError
from bench.costs import Cost, determinism_costs, durability_costs, print_costs
from bench.echo import EchoClient
from bench.processes import Worker, echo_server
from bench.report import Comparison, machine, print_comparisons, write_json
from cellserve import AsyncClient
from demo.server_process import ServerError, ServerProcess

_SECONDS = 2.0
_QUICK_SECONDS = 0.4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 where the service does not answer what it must, however fast."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short samples: rough figures")
    parser.add_argument(
        "--only", metavar="WORDS", default="", help="comparisons with these words in their name; or costs"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="samples of each (default 5)")
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="for all processes together (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("server", nargs="*", metavar="SERVER_OPTION", help="behind --: options of cellserve-server")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    # Inherited by every process started from here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    console.print(f"{len(os.sched_getaffinity(0))} cores for server and client; load {os.getloadavg()[0]:.2f}")
    try:
        comparisons, costs = asyncio.run(_run(console, options))
    except (CheckError, ServerError) as error:
        Console(stderr=True, highlight=False).print(f"The benchmark failed: {error}", markup=False)
        return 1
    if comparisons:
        print_comparisons(console, comparisons)
    if costs:
        console.print()
        print_costs(console, costs)
    if options.json is not None:
        write_json(options.json, comparisons, costs)
    return 0


async def _run(console: Console, options: argparse.Namespace) -> tuple[list[Comparison], list[Cost]]:
    def tell(line: str) -> None:
        console.print(line, style="dim")

    reference = Worker("bench.reference")
    try:
        with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as directory:
            models = Path(directory) / "models"
            await reference.call("write_models", models, HIDDEN_SIZES)
            arguments = [f"--models={models}", *options.server]
            server = ServerProcess(Path(directory) / "server.log", arguments)
            with echo_server() as port, server:
                async with AsyncClient(server.target) as client, EchoClient(port, NUM_STREAMS) as echo:
                    bench = Bench(
                        client=client,
                        server_pid=server.pid,
                        echo=echo,
                        reference=reference,
                        models=models,
                        seconds=_QUICK_SECONDS if options.quick else _SECONDS,
                        rounds=options.rounds,
                    )
                    await bench.check()
                    comparisons = await bench.run(options.only, tell)
            costs: list[Cost] = []
            if options.only in "costs":
                store = f"--store=sqlite:///{directory}/sessions.db"
                with ServerProcess(Path(directory) / "server.log", [store, *arguments]) as server:
                    async with AsyncClient(server.target) as client:
                        costs = await _costs(client, server.pid, reference, models, options, tell)
            return comparisons, costs
    finally:
        reference.close()


async def _costs(
    client: AsyncClient,
    server_pid: int,
    reference: Worker,
    models: Path,
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> list[Cost]:
    costs: list[Cost] = []
    for durability, goal in (("periodic", 1.05), ("sync", None)):
        costs += await durability_costs(
            client,
            server_pid,
            "gru512",
            durability=durability,  # type: ignore[arg-type]
            pairs=4 if options.quick else 20,
            seconds=_QUICK_SECONDS if options.quick else _SECONDS,
            goal=goal,
            tell=tell,
        )
    tell("the stepper with deterministic on, beside off")
    seconds = _QUICK_SECONDS / 2
    return costs + await determinism_costs(reference, models, pairs=4 if options.quick else 20, seconds=seconds)


if __name__ == "__main__":
    raise SystemExit(main())
