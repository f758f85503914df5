"""What the figures depend on, the table of results, and the file with every sample."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.rows import Row
from bench.statistics import median, quartiles

__all__ = ["machine", "print_rows", "write_json"]

_PACKAGES: Final = ("cellserve", "grpcio", "protobuf", "numpy", "torch", "onnxruntime")


def machine(num_cores: int) -> dict[str, object]:
    """What the figures depend on beside the code. num_cores: that all processes together may use."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": _processor(), "cores": num_cores, "python": platform.python_version(), **versions}


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table of medians. Quartiles in brackets; of the ratio the 95 % interval where there are 20 pairs."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "measured", "beside, in the same run"):
        table.add_column(heading)
    for heading in ("ours", "limit", "unit", "ratio", "goal", "further"):
        table.add_column(heading, justify="left" if heading in ("unit", "further") else "right")
    for row in rows:
        table.add_row(
            row.id,
            row.name,
            row.beside,
            _samples(row.ours),
            _samples(row.limits) if row.limits else "",
            row.unit,
            _ratio(row),
            "" if row.goal is None else f"{row.goal} {'reached' if row.is_met else 'MISSED'}",
            ", ".join(f"{name} {_number(median(values))}" for name, values in row.details.items()),
        )
    console.print(table, markup=False)
    goals = [row for row in rows if row.goal is not None]
    missed = sum(not row.is_met for row in goals)
    console.print(
        "Medians of the turns, quartiles in brackets; the ratio is the median of those of each turn, in brackets its "
        f"quartiles, or from 20 pairs on its 95 % interval. {len(goals)} goals, {missed} missed."
    )


def write_json(path: Path, constants: Mapping[str, object], rows: Sequence[Row]) -> None:
    """Write everything; whoever reads meanwhile finds the old file or the new."""
    document = {"machine": dict(constants), "rows": [row.document() for row in rows]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n")
    part.replace(path)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _samples(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _number(values[0])
    low, high = quartiles(values)
    return f"{_number(median(values))} ({_number(low)}-{_number(high)})"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    if len(row.ratios) == 1:
        return f"{row.ratio:.3g}"
    if row.interval is not None:
        low, high = row.interval
        return f"{row.ratio:.3f} [{low:.3f}-{high:.3f}]"
    low, high = quartiles(row.ratios)
    return f"{row.ratio:.3g} ({low:.3g}-{high:.3g})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
