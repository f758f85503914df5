"""K1 and K3: one step of every cell, and long runs of the GRUs, on a CPU."""

from __future__ import annotations

from typing import Final

from bench.float64 import NUM_CHECKED_STEPS, TOLERANCE
from bench.models import CELLS
from bench.rows import Goal, Row
from bench.running import Bench

__all__ = ["cell_chunks", "cell_steps"]

_CHECKED: Final = f"states after {NUM_CHECKED_STEPS} steps against float64, within {TOLERANCE:g}"
_PEER_NAMES: Final = {"torch": "torch's cell, one thread", "onnx": "ONNX Runtime, one thread"}
_PEER_GOALS: Final = {"torch": 1.3, "onnx": 1.2}
# Of the sum of the cell's own products, from 64 rows on.
_GOAL_BY_HIDDEN_SIZE: Final = {256: 0.6, 512: 0.75, 1024: 0.85, 2048: 0.85}
_NUM_THREADS: Final = 1


async def cell_steps(bench: Bench) -> None:
    """K1: one step, from slab to slab, beside its own products, its weights' bytes, torch and ONNX Runtime."""
    effort = bench.effort
    hidden_sizes = effort.hidden_sizes or ((256, 512) if effort.is_quick else tuple(_GOAL_BY_HIDDEN_SIZE))
    batch_sizes = effort.batch_sizes or ((1, 64) if effort.is_quick else (1, 8, 64, 512))
    for hidden_size in hidden_sizes:
        for cell in CELLS:
            for batch_size in batch_sizes:
                bench.tell(f"K1: {cell}, H={hidden_size}, B={batch_size}, beside its limits and peers")
                samples = await bench.cells.call(
                    "cell_step",
                    cell,
                    hidden_size,
                    batch_size,
                    seconds=effort.kernel_seconds,
                    turns=effort.turns,
                    num_threads=_NUM_THREADS,
                )
                for row in _step_rows(cell, hidden_size, batch_size, samples):
                    bench.add(row)


def _step_rows(cell: str, hidden_size: int, batch_size: int, samples: dict[str, list[float]]) -> list[Row]:
    size = {"H": hidden_size, "B": batch_size}

    def row(ours: str, beside: str, limit: str, goal: Goal | None, what: str = cell) -> Row:
        found = Row("K1", what, size, "tokens/s", beside, goal, _CHECKED)
        for mine, other in zip(samples[ours], samples[limit], strict=True):
            found.add(mine * batch_size, other * batch_size, us_a_step=1e6 / mine)
        return found

    rows = []
    if batch_size == 1:
        rows.append(row("ours", "its weights read once", "weights", Goal(">=", 0.75)))
    else:
        least = _GOAL_BY_HIDDEN_SIZE.get(hidden_size) if batch_size >= 64 else None
        goal = None if least is None else Goal(">=", least)
        rows.append(row("ours", "its products by torch.mm", "mm", goal))
    if batch_size in (1, 64):
        for peer, name in _PEER_NAMES.items():
            if peer in samples:
                is_goal = batch_size >= 64 and "gru" in cell
                rows.append(row("ours", name, peer, Goal(">=", _PEER_GOALS[peer]) if is_goal else None))
    if "deterministic" in samples:
        rows.append(row("deterministic", "the same with it off", "ours", None, f"{cell}, deterministic"))
    return rows


async def cell_chunks(bench: Bench) -> None:
    """K3: runs of DeepBench's GRU sizes with vectors in, beside nn.GRU and ONNX Runtime."""
    effort = bench.effort
    sizes = [(hidden_size, rows, 187) for hidden_size in (512, 1024, 1536, 2048, 2816) for rows in (1, 2, 4)]
    sizes += [(512, 1, 375), (512, 1, 750), (512, 1, 1500)]
    if effort.is_quick:
        sizes = [(512, 1, 64)]
    peers = {"gru_reset_after": "nn.GRU, one thread", "gru": "ONNX Runtime, one thread"}
    for hidden_size, num_rows, num_steps in sizes:
        for cell, peer in peers.items():
            size = {"H": hidden_size, "N": num_rows, "T": num_steps}
            row = Row("K3", f"{cell}, a run of vectors", size, "tokens/s", peer, Goal(">=", 1.1))
            row.checked = f"the state after {num_steps} steps against float64, within {TOLERANCE:g}"
            bench.tell(f"K3: {row.name}, beside {peer}")
            try:
                samples = await bench.cells.call(
                    "chunk",
                    cell,
                    hidden_size,
                    num_rows,
                    num_steps,
                    seconds=effort.kernel_seconds,
                    turns=effort.turns,
                )
            except ImportError:
                bench.tell(f"K3: {peer} is not installed")
                continue
            tokens = num_rows * num_steps
            for mine, other in zip(samples["ours"], samples["peer"], strict=True):
                row.add(mine * tokens, other * tokens, us_a_step=1e6 / mine / num_steps)
            bench.add(row)
