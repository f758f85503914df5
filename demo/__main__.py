"""`make demo`: follows source files byte by byte on a server of its own, and carries a state over its restart."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cellserve.cli.metrics import MetricsError
from cellserve.errors import CellserveError
from demo.main_job import DemoError, run_demo
from demo.server_process import ServerError

_WIDTH = 140  # where there is no terminal that has one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--files", type=_positive, default=64, metavar="N", help="files to follow (default 64)")
    parser.add_argument(
        "--bytes", type=_positive, default=8192, metavar="N", help="bytes of each, one a step (default 8192)"
    )
    options = parser.parse_args(arguments)
    # As Ctrl-C does, so that the server is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
    try:
        with tempfile.TemporaryDirectory(prefix="cellserve-demo-") as directory:
            asyncio.run(run_demo(console, Path(directory), num_files=options.files, max_bytes=options.bytes))
    except (DemoError, ServerError, CellserveError, MetricsError) as error:
        Console(stderr=True, highlight=False).print(f"The demo failed: {error}", markup=False, emoji=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    raise SystemExit(main())
