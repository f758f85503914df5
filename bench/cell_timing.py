"""Times one step of a cell, or a long run of it, beside the sum of its products and beside other implementations.

Runs in a process of its own (see processes.Worker). Symbols: B rows, T steps, H hidden size, I input size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from bench.float64 import NUM_CHECKED_STEPS, TOLERANCE, Reference, WrongAnswerError
from bench.models import CELLS, VOCAB_SIZE, write_model
from bench.peers import ONNX_CELLS, make_onnx_run, make_torch_step
from cellserve_model import Stepper, load_stepper

__all__ = ["cell_step", "chunk", "machine_constants"]

_MAX_CHECKED_ROWS: Final = 8

Samples = dict[str, list[float]]
Contender = Callable[[], object]


def cell_step(cell: str, hidden_size: int, num_rows: int, *, seconds: float, turns: int, num_threads: int) -> Samples:
    """Steps a second of B rows, in turns: ours, `mm`, `weights`, `torch`, `onnx` and, for B=1, `deterministic`.

    ours: from slab to slab, tokens in, no outputs. mm: the cell's recurrent products by torch.mm into buffers.
    weights: its weights read once by the fastest of three reductions. torch and onnx: their cells with vectors in,
    where there are such. Raises WrongAnswerError where ours, torch's or ONNX Runtime's states are not those of float64.
    """
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as folder, torch.inference_mode():
        directory = write_model(Path(folder), cell, hidden_size)
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (NUM_CHECKED_STEPS, num_rows)).astype(np.uint32)
        contenders = {"ours": _checked_stepper(directory, cell, tokens, num_threads, deterministic=False)}
        if num_rows == 1:
            contenders["deterministic"] = _checked_stepper(directory, cell, tokens, num_threads, deterministic=True)
        contenders |= {"mm": _products(cell, hidden_size, num_rows), "weights": _weight_read(cell, hidden_size)}
        contenders |= _checked_peers(directory, cell, tokens)
        return _in_turns(contenders, seconds, turns)


def chunk(cell: str, hidden_size: int, num_rows: int, num_steps: int, *, seconds: float, turns: int) -> Samples:
    """Runs a second of T steps of B rows with vectors of H numbers in, in turns: ours and `peer`, on one thread.

    peer: nn.GRU for `gru_reset_after`, ONNX Runtime's GRU for `gru`. Raises WrongAnswerError, ImportError.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as folder, torch.inference_mode():
        directory = write_model(Path(folder), cell, hidden_size, input_size=hidden_size)
        vectors = np.random.default_rng(0).standard_normal((num_steps, num_rows, hidden_size), np.float32)
        stepper = _load(directory, num_rows, 1, deterministic=False)
        slots, counts = np.arange(1, num_rows + 1), np.full(num_rows, num_steps)
        by_row = np.ascontiguousarray(vectors.swapaxes(0, 1)).reshape(-1, hidden_size)
        wants = np.zeros(num_rows * num_steps, np.uint8)
        zeros = np.zeros((num_rows, hidden_size), np.float32)
        peer: Callable[[], npt.NDArray[np.float32]]
        if cell == "gru":
            run = make_onnx_run(directory, cell, num_steps, num_rows)
            peer = lambda: run(vectors, zeros)  # noqa: E731
        else:
            peer = _torch_gru(directory, cell, vectors)
        # Rounding differs with the number of steps; so many are compared that a wrong weight would show.
        reference, state = Reference.of(directory, cell), np.zeros((num_rows, hidden_size))
        for vector in vectors:
            state = reference.advance(state, vector)
        stepper.collect(stepper.submit(slots, counts, by_row, wants, 0))
        _compare(stepper.read_rows(slots)[:, 0], state, "ours")
        _compare(peer(), state, "the peer")
        ours = lambda: stepper.collect(stepper.submit(slots, counts, by_row, wants, 0))  # noqa: E731
        return _in_turns({"ours": ours, "peer": peer}, seconds, turns)


def machine_constants(seconds: float) -> dict[str, float]:
    """What one core can do: its best product in GFLOP/s, and reading in GB/s from main memory and from the caches."""
    torch.set_num_threads(1)
    size = 1024
    left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    samples = _in_turns(
        {
            "mm": lambda: torch.mm(left, right, out=out),
            "memory": _reading(64 * 2**20),
            "cache": _reading(2**20),
        },
        seconds,
        5,
    )
    best = {name: max(values) for name, values in samples.items()}
    return {
        "mm_gflops_per_core": 2 * size**3 * best["mm"] / 1e9,
        "memory_read_gbytes_per_second": 4 * 64 * 2**20 * best["memory"] / 1e9,
        "cache_read_gbytes_per_second": 4 * 2**20 * best["cache"] / 1e9,
    }


def _load(directory: Path, num_rows: int, num_threads: int, *, deterministic: bool) -> Stepper:
    stepper = load_stepper(
        directory,
        name="bench",
        version=1,
        device="cpu",
        num_slots=num_rows,
        max_batch=num_rows,
        deterministic=deterministic,
        num_threads=num_threads,
    )
    stepper.warm_up()
    return stepper


def _checked_stepper(
    directory: Path, cell: str, tokens: npt.NDArray[np.uint32], num_threads: int, *, deterministic: bool
) -> Contender:
    """A step of our own for all rows, compared with float64 after 64. tokens: (64, B)."""
    num_rows = tokens.shape[1]
    stepper = _load(directory, num_rows, num_threads, deterministic=deterministic)
    slots, counts = np.arange(1, num_rows + 1), np.ones(num_rows, np.int64)
    wants = np.zeros(num_rows, np.uint8)
    for row in tokens:
        stepper.collect(stepper.submit(slots, counts, row, wants, 0))
    checked = _checked_rows(num_rows)
    state = stepper.read_rows(slots[checked])[:, 0]
    _compare(state, _expected(directory, cell, tokens[:, checked]), "deterministic" if deterministic else "ours")
    return lambda: stepper.collect(stepper.submit(slots, counts, tokens[0], wants, 0))


def _checked_peers(directory: Path, cell: str, tokens: npt.NDArray[np.uint32]) -> dict[str, Contender]:
    """torch's cell and ONNX Runtime's, with embedded tokens in. tokens: (64, B)."""
    peers: dict[str, Contender] = {}
    num_rows = tokens.shape[1]
    checked = _checked_rows(num_rows)
    reference = Reference.of(directory, cell)
    embedded = reference.weights["embedding"][tokens].astype(np.float32)  # (64, B, E)
    expected = _expected(directory, cell, tokens[:, checked])
    zeros = reference.zero_state(num_rows).astype(np.float32)
    module = make_torch_step(directory, cell)
    if module is not None:
        vectors = torch.from_numpy(embedded)
        first = torch.from_numpy(zeros)
        state = tuple(part.contiguous() for part in first.chunk(2, 1)) if cell == "lstm" else first
        fixed = state
        for row in vectors:
            state = module(row, state)
        if cell != "gru":  # nn.GRUCell is another function there: it is timed, not compared
            found = torch.cat(state, dim=1) if isinstance(state, tuple) else state
            _compare(found[checked].numpy(), expected, "torch")
        peers["torch"] = lambda: module(vectors[0], fixed)
    if cell in ONNX_CELLS:
        try:
            run = make_onnx_run(directory, cell, 1, num_rows)
        except ImportError:
            return peers
        found_state = zeros
        for step in embedded:
            found_state = run(step[None], found_state)
        _compare(found_state[checked], expected, "ONNX Runtime")
        peers["onnx"] = lambda: run(embedded[:1], zeros)
    return peers


def _torch_gru(directory: Path, cell: str, vectors: npt.NDArray[np.float32]) -> Callable[[], npt.NDArray[np.float32]]:
    module = make_torch_step(directory, cell)
    assert isinstance(module, torch.nn.GRUCell)
    gru = torch.nn.GRU(module.input_size, module.hidden_size)
    gru.load_state_dict({f"{name}_l0": parameter for name, parameter in module.state_dict().items()})
    given = torch.from_numpy(vectors)

    def run() -> npt.NDArray[np.float32]:
        last: npt.NDArray[np.float32] = gru(given)[1][0].numpy()
        return last

    return run


def _products(cell: str, hidden_size: int, num_rows: int) -> Contender:
    """The recurrent products of a step, each (B, H) by (H, n*H): `gru` needs two, since the second reads the first."""
    blocks = [2, 1] if cell == "gru" else [CELLS[cell]]
    hidden = torch.randn(num_rows, hidden_size)
    weights = [torch.randn(hidden_size, count * hidden_size) for count in blocks]
    outs = [torch.empty(num_rows, count * hidden_size) for count in blocks]

    def run() -> None:
        for weight, out in zip(weights, outs, strict=True):
            torch.mm(hidden, weight, out=out)

    return run


def _weight_read(cell: str, hidden_size: int) -> Contender:
    return _reading(CELLS[cell] * hidden_size**2)


def _reading(num_floats: int) -> Contender:
    """Reads so many float32 once, by the reduction that does it fastest here."""
    numbers = torch.ones(num_floats)
    reductions: list[Contender] = [numbers.sum, numbers.amax, lambda: torch.dot(numbers, numbers)]
    return max(reductions, key=lambda reduction: _rate(reduction, 0.02))


def _expected(directory: Path, cell: str, tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    reference = Reference.of(directory, cell)
    state = reference.zero_state(tokens.shape[1])
    for row in tokens:
        state = reference.advance(state, row)
    return state


def _checked_rows(num_rows: int) -> npt.NDArray[np.int64]:
    """Rows to compare: float64 by numpy for all would take longer than everything else."""
    return np.unique(np.linspace(0, num_rows - 1, min(num_rows, _MAX_CHECKED_ROWS)).astype(np.int64))


def _compare(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float64], whose: str) -> None:
    error = float(np.abs(found - expected).max())
    if not error <= TOLERANCE:
        raise WrongAnswerError(f"{whose}: states differ from float64 by {error:.2g}, allowed are {TOLERANCE:g}")


def _in_turns(contenders: dict[str, Contender], seconds: float, turns: int) -> Samples:
    """Calls a second of each, one after the other, again and again, so that a change of the machine meets all."""
    samples: Samples = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(turns):
        for name, contender in contenders.items():
            samples[name].append(_rate(contender, seconds))
    return samples


def _rate(contender: Contender, seconds: float) -> float:
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        contender()
        calls += 1
    return calls / elapsed
