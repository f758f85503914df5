"""Draws the results of a run as SVG: cell time against batch, throughput against sessions, latency against load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.models import CELLS

__all__ = ["draw"]

# The same bytes for the same figures, and text that stays text.
mpl.rcParams.update({"svg.hashsalt": "cellserve", "svg.fonttype": "none", "font.size": 9})

_ROOFLINE_CELL: Final = "gru"
_BYTES_OF_A_FLOAT: Final = 4


def draw(file: Path, directory: Path) -> list[Path]:
    """Draw what the JSON file of a run has; returns the files written. A plot without data is left out."""
    document = json.loads(file.read_text())
    rows: list[dict[str, Any]] = document["rows"]
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {
        "cell-time.svg": _cell_time(rows, document["machine"]),
        "throughput.svg": _throughput(rows),
        "latency.svg": _latency(rows),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(directory / name, metadata={"Date": None})
            written.append(directory / name)
    return written


def _cell_time(rows: Sequence[dict[str, Any]], constants: dict[str, Any]) -> Figure | None:
    """Microseconds of a step by batch size; its limit in the same run; what arithmetic and bytes need at least."""
    found = [row for row in rows if row["id"] == "K1" and row["what"] == _ROOFLINE_CELL and _is_first(row)]
    if not found:
        return None
    figure, axes = _axes(f"one step of {_ROOFLINE_CELL}, one thread", "sessions in the batch", "microseconds")
    for color, hidden_size in enumerate(sorted({row["size"]["H"] for row in found})):
        batch_sizes = sorted(row["size"]["B"] for row in found if row["size"]["H"] == hidden_size)
        rows_by_batch = [_one(found, hidden_size, batch) for batch in batch_sizes]
        times = [row["details"]["us a step"] for row in rows_by_batch]
        limits = [1e6 * row["size"]["B"] / row["limit"] for row in rows_by_batch]
        roof = [_roof_microseconds(hidden_size, batch, constants) for batch in batch_sizes]
        axes.plot(batch_sizes, times, "o-", color=f"C{color}", label=f"H={hidden_size}")
        axes.plot(batch_sizes, limits, "--", color=f"C{color}", linewidth=0.8)
        axes.plot(batch_sizes, roof, ":", color=f"C{color}", linewidth=0.8)
    axes.plot([], [], "--", color="gray", linewidth=0.8, label="weights read, then torch.mm, same run")
    axes.plot([], [], ":", color="gray", linewidth=0.8, label="roofline of the machine's best")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend()
    return figure


def _roof_microseconds(hidden_size: int, batch_size: int, constants: dict[str, Any]) -> float:
    """The larger of arithmetic and weights read, at this machine's best."""
    numbers = CELLS[_ROOFLINE_CELL] * hidden_size**2
    read = float(constants["cache_read_gbytes_per_second"])
    if numbers * _BYTES_OF_A_FLOAT > 2**25:  # more than the caches hold
        read = float(constants["memory_read_gbytes_per_second"])
    arithmetic = 2 * numbers * batch_size / float(constants["mm_gflops_per_core"])
    return max(arithmetic, numbers * _BYTES_OF_A_FLOAT / read) / 1000


def _throughput(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Tokens a second of the closed loops by sessions, and their limits."""
    found = [
        row
        for row in rows
        if row["id"] == "E1" and row["what"] == "coroutines, a token a call" and row["size"]["H"] == 512
    ]
    if not found:
        return None
    figure, axes = _axes("a token a call, gru of 512", "sessions", "tokens a second")
    found.sort(key=lambda row: row["size"]["sessions"])
    numbers = [row["size"]["sessions"] for row in found]
    axes.plot(numbers, [row["ours"] for row in found], "o-", label="through the service")
    axes.plot(numbers, [row["limit"] for row in found], "--", color="gray", label="reference step in process")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _latency(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Latencies on a schedule by load."""
    found = [row for row in rows if row["id"] == "E2"]
    if not found:
        return None
    found.sort(key=lambda row: row["size"]["requests/s"])
    own = [row for row in found if row["limit"] is None] or found
    beside = [row for row in found if row["limit"] is not None]
    figure, axes = _axes("requests at random times, gru of 512", "requests a second", "milliseconds")
    loads = [row["size"]["requests/s"] for row in own]
    axes.plot(loads, [row["ours"] for row in own], "o-", label="p99")
    axes.plot(loads, [row["details"]["p50 ms"] for row in own], "o-", label="p50")
    if beside:
        echo = ([row["size"]["requests/s"] for row in beside], [row["limit"] for row in beside])
        axes.plot(*echo, "s--", color="gray", label="p99 of a raw echo")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.legend()
    return figure


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _is_first(row: dict[str, Any]) -> bool:
    """Whether this is the row of its size that has the cell's own limit beside it."""
    return "its " in str(row["beside"])


def _one(rows: Sequence[dict[str, Any]], hidden_size: int, batch_size: int) -> dict[str, Any]:
    return next(row for row in rows if row["size"] == {"H": hidden_size, "B": batch_size})
