"""Gathers samples of contenders and limits, and prints each median beside its limit's."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = ["Comparison", "Sample", "machine", "print_comparisons", "write_json"]

_PACKAGES: Final = ("cellserve", "grpcio", "protobuf", "numpy", "torch")


@dataclass(frozen=True, slots=True)
class Sample:
    """One timing of the service. Latencies as the client sees them; CPU time per token of either process."""

    tokens_per_second: float
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    client_cpu_microseconds: float | None = None
    server_cpu_microseconds: float | None = None


@dataclass(slots=True)
class Comparison:
    """A contender and its limit, sampled in turns. goal: the ratio to reach, where there is one."""

    name: str
    limit_name: str
    goal: float | None = None
    samples: list[Sample] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)  # tokens/s

    @property
    def ratio(self) -> float:
        """The median over the turns of contender to limit, each pair measured one after the other."""
        return median(
            [sample.tokens_per_second / limit for sample, limit in zip(self.samples, self.limits, strict=True)]
        )


def median(values: Sequence[float | None]) -> float:
    return float(np.median([value for value in values if value is not None]))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles between which the middle half lies."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def print_comparisons(console: Console, comparisons: Sequence[Comparison]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("measured", "limit in the same run"):
        table.add_column(name)
    for name in ("tokens/s", "limit", "ratio", "goal", "p50 ms", "p99 ms", "client CPU", "server CPU"):
        table.add_column(name, justify="right")
    for comparison in comparisons:
        samples = comparison.samples
        table.add_row(
            comparison.name,
            comparison.limit_name,
            _rate([sample.tokens_per_second for sample in samples]),
            _rate(comparison.limits),
            f"{comparison.ratio:.2f}",
            "" if comparison.goal is None else f">= {comparison.goal:g}{_verdict(comparison)}",
            _milliseconds([sample.p50_seconds for sample in samples]),
            _milliseconds([sample.p99_seconds for sample in samples]),
            _microseconds([sample.client_cpu_microseconds for sample in samples]),
            _microseconds([sample.server_cpu_microseconds for sample in samples]),
        )
    console.print(table)
    console.print(
        "Medians, with the quartiles in brackets; the ratio is the median of those of each turn. "
        "CPU in microseconds of processor time per token."
    )


class Rated(Protocol):
    """A dataclass with a ratio."""

    @property
    def ratio(self) -> float: ...


def write_json(path: Path, comparisons: Sequence[Comparison], costs: Sequence[Rated] = ()) -> None:
    document = {
        "machine": machine(),
        "comparisons": [asdict(comparison) | {"ratio": comparison.ratio} for comparison in comparisons],
        "costs": [asdict(cost) | {"ratio": cost.ratio} for cost in costs],  # type: ignore[call-overload]
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _verdict(comparison: Comparison) -> str:
    assert comparison.goal is not None
    return " reached" if comparison.ratio >= comparison.goal else " MISSED"


def _rate(values: Sequence[float]) -> str:
    low, high = spread(values)
    return f"{median(values):,.0f} ({low:,.0f}-{high:,.0f})"


def _milliseconds(values: Sequence[float | None]) -> str:
    return "" if None in values else f"{1e3 * median(values):.2f}"


def _microseconds(values: Sequence[float | None]) -> str:
    return "" if None in values else f"{median(values):.1f}"
