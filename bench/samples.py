"""A sample of a server at work, and the processor time and memory of other processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Sample", "cpu_seconds", "resident_bytes"]

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    """One timing. Latencies as the client sees them; processor time per token of either process."""

    tokens_per_second: float
    p50_seconds: float
    p99_seconds: float
    client_cpu_microseconds: float
    server_cpu_microseconds: float

    @property
    def details(self) -> dict[str, float]:
        """For Row.add."""
        return {
            "p50_ms": 1000 * self.p50_seconds,
            "p99_ms": 1000 * self.p99_seconds,
            "client_us/token": self.client_cpu_microseconds,
            "server_us/token": self.server_cpu_microseconds,
        }


def cpu_seconds(pid: int) -> float:
    """Processor time of another process, user and system, of all threads that it has.

    By the scheduler's nanoseconds where the kernel tells them: the usual ticks are 10 ms, a few per cent of a sample.
    """
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def resident_bytes(pid: int) -> int:
    """What a process has in memory; exact, where VmRSS is behind by some pages of each thread."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"process {pid} does not tell what it has resident")
