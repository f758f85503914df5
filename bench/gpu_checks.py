"""What bench/gpu.py times, and the checks that come before: against float64, of determinism, of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellserve_model.config import ModelConfig, TokenInput
from cellserve_model.cuda.network import CudaNetwork, RunOutputs, RunRows
from cellserve_model.cuda.slab import CudaSlab
from cellserve_model.cuda.weights import prepare_weights
from cellserve_model.equations import EQUATIONS

__all__ = [
    "CHECKED_STEPS",
    "VOCABULARY",
    "CheckError",
    "check_determinism",
    "check_run",
    "check_steps",
    "make_network",
    "make_run",
    "set_rows",
]

VOCABULARY = 256
CHECKED_STEPS = 64
_CHECKED_ROWS = 48
# Products read states rounded to 2^-9 of themselves, where float64 reads them whole. Three times the worst that a
# simulation of this rounding in float64 gave over these steps: 0.003, of vanilla_rnn.
_TOLERANCE = 0.01


class CheckError(Exception):
    """A kernel does not compute what it must."""


def make_network(
    cell: str, hidden_size: int, num_rows: int, device: torch.device, *, deterministic: bool = False
) -> CudaNetwork:
    """A network of one layer over ids, with random weights in bfloat16 and a slab for `num_rows` sessions."""
    config = ModelConfig(cell, 1, hidden_size, TokenInput(VOCABULARY, 16), None)
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        scale = 0.7 * shape[-1] ** -0.5 if len(shape) == 2 else 0.5
        values = np.asarray(scale * random.standard_normal(shape), dtype=np.float32)
        tensors[name] = torch.from_numpy(np.full((), 0.5, np.float32) if name.endswith("leak") else values)
    slab = CudaSlab(config, num_rows, num_rows, device)
    weights = prepare_weights(config, tensors, device, torch.bfloat16)
    return CudaNetwork(config, weights, slab, num_rows, deterministic=deterministic)


def set_rows(network: CudaNetwork, slots: Tensor, tokens: Tensor, *, is_odd: bool) -> int:
    """Tell a step which rows to read and write, and the tokens. Returns the rows of the bucket."""
    num_rows, num_slots = len(slots), network.slab.num_slots
    bucket = network.bucket(num_rows)
    columns = network.step.columns(bucket)
    columns.zero_()
    columns[int(is_odd), :num_rows] = slots
    columns[int(not is_odd), :num_rows] = slots + num_slots
    columns[2, :num_rows] = tokens
    return bucket


def check_steps(cell: str, hidden_size: int, device: torch.device) -> float:
    """Step some rows and compare with the cell's equations in float64 on the same weights. Returns the error."""
    network = make_network(cell, hidden_size, _CHECKED_ROWS, device)
    weights, width, blocks = network.weights, network.width, network.config.spec.num_blocks
    assert weights.table is not None
    layer = _Layer(
        weights.recurrent_weights[0].double().flatten(0, 1),
        weights.recurrent_biases[0].double(),
        weights.leaks[0].double(),
    )
    generator = torch.Generator().manual_seed(0)
    slots = (torch.randperm(_CHECKED_ROWS, generator=generator) + 1).to(device)
    exact = torch.zeros(_CHECKED_ROWS, network.config.spec.state_vectors * width, dtype=torch.float64, device=device)
    for step in range(CHECKED_STEPS):
        tokens = torch.randint(VOCABULARY, (_CHECKED_ROWS,), generator=generator).to(device)
        network.launch_step(set_rows(network, slots, tokens, is_odd=step % 2 == 1))
        inputs = weights.table[tokens].double().view(-1, blocks * width)
        exact, _ = EQUATIONS[cell](inputs, exact, layer)
    found = network.slab.gather(slots.cpu().numpy())[:, 0].double()
    exact = exact.view(_CHECKED_ROWS, -1, width)[..., :hidden_size].flatten(1)
    error = float((found - exact).abs().max())
    if not error < _TOLERANCE:
        raise CheckError(f"{cell}, H={hidden_size}: {error:.2g} off float64 after {CHECKED_STEPS} steps")
    return error


def check_determinism(cell: str, hidden_size: int, sizes: Sequence[int], device: torch.device) -> None:
    """With `deterministic` on, one session has the same state to the last bit whatever shares its batch."""
    network = make_network(cell, hidden_size, max(sizes), device, deterministic=True)
    states = []
    for size in sorted(set(sizes)):
        generator = torch.Generator().manual_seed(size)
        network.slab.bits.zero_()
        slots = torch.arange(1, size + 1, device=device).flip(0)  # the session is in the last row: its slot is 1
        for step in range(4):
            tokens = torch.randint(VOCABULARY, (size,), generator=generator).to(device)
            tokens[-1] = step
            network.launch_step(set_rows(network, slots, tokens, is_odd=step % 2 == 1))
        states.append(network.slab.bits[1].clone())
    if not all(torch.equal(state, states[0]) for state in states):
        raise CheckError(f"{cell}, H={hidden_size}: a deterministic session depends on its batch")


def make_run(network: CudaNetwork, bucket: int, tokens: Tensor) -> tuple[RunRows, RunOutputs]:
    """The run of tokens (B, T) int32 by the rows that the step buffers name, no outputs asked."""
    (num_rows, num_steps), device = tokens.shape, tokens.device
    columns = torch.zeros(4, bucket, dtype=torch.int32, device=device)
    columns[:2] = network.step.columns(bucket)[:2]
    columns[2, :num_rows] = torch.arange(num_rows, device=device) * num_steps
    columns[3, :num_rows] = num_steps
    row_tiles = bucket // network.cell_tile(bucket).rows
    nowhere = torch.full((num_steps, bucket), -1, dtype=torch.int32, device=device)
    nothing = torch.empty(0, 2, network.width, dtype=torch.int16, device=device)
    rows = RunRows(
        sources=columns[0],
        targets=columns[1],
        starts=columns[2],
        counts=columns[3],
        row_tiles=torch.full((num_steps,), row_tiles, dtype=torch.int32, device=device),
        tokens=tokens.flatten(),
        inputs=nothing,
        hidden_places=nowhere,
        state_places=nowhere,
        gate_places=nowhere,
    )
    return rows, RunOutputs(hidden=nothing, states=nothing.float(), gates=nothing.float())


def check_run(cell: str, hidden_size: int, device: torch.device) -> None:
    """A run in one launch leaves the states that as many steps leave."""
    together, apart = (make_network(cell, hidden_size, _CHECKED_ROWS, device) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (_CHECKED_ROWS, 5), generator=generator, dtype=torch.int32).to(device)
    slots = torch.arange(1, _CHECKED_ROWS + 1, device=device)
    bucket = set_rows(together, slots, tokens[:, 0], is_odd=False)
    together.launch_run(*make_run(together, bucket, tokens))
    for step in range(5):
        apart.launch_step(set_rows(apart, slots, tokens[:, step], is_odd=step % 2 == 1))
    ends = slots.cpu().numpy() + _CHECKED_ROWS
    error = float((together.slab.gather(ends) - apart.slab.gather(ends)).abs().max())
    if not error < _TOLERANCE:
        raise CheckError(f"{cell}, H={hidden_size}: a run in one launch is {error:.2g} off its steps one by one")


@dataclass(slots=True)
class _Layer:
    recurrent_weight: Tensor
    recurrent_bias: Tensor | None
    leak: Tensor | None
