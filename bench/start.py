"""C1: from the start of the process to SERVING."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Final

from bench.rows import Goal, Row
from bench.running import Bench
from bench.samples import cpu_seconds

__all__ = ["start"]

_IMPORT: Final = (
    "import grpc, torch, pathlib; "
    "fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2].split(); "
    "print(int(fields[11]) + int(fields[12]))"
)
_ALLOWED_SECONDS: Final = 3.0


async def start(bench: Bench) -> None:
    """C1: processor time to SERVING with four models, beside that of importing grpc and torch, and 3 s."""
    hidden_sizes = (128, 256) if bench.effort.is_quick else (256, 512, 1024, 2048)
    for hidden_size in hidden_sizes:
        bench.model(hidden_size)
    size = {"models": f"H={'/'.join(map(str, hidden_sizes))}"}
    row = Row("C1", "start to SERVING", size, "CPU s", "import grpc and torch, + 3 s", Goal("<=", 1.0))
    row.checked = "the health service says SERVING"
    bench.tell(f"C1: {row.name}")
    for _ in range(bench.effort.turns):
        bare = _import_seconds()
        begin = time.perf_counter()
        with bench.server() as server:
            wall = time.perf_counter() - begin
            used = cpu_seconds(server.pid)
        row.add(used, bare + _ALLOWED_SECONDS, import_s=bare, wall_s=wall)
    bench.add(row)


def _import_seconds() -> float:
    """Processor time of a process that imports grpc and torch."""
    ticks = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True).stdout
    return int(ticks) / os.sysconf("SC_CLK_TCK")
