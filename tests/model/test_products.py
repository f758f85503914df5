"""Every way to multiply and to step on a CPU against float64, at sizes on both sides of each choice."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from cellserve_model import CELLS, Stepper, Want, load_stepper
from cellserve_model import workspace as workspace_module
from cellserve_model.products import LARGE_BYTES, Weight, bind_add, bind_biased, bind_fill, can_pack, fastest, packed
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

# The least width of which every cell's largest recurrent weight is packed.
LARGE = 512
SIZES = (1, 2, 3, 7, 8, 9, 64, 65)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights() -> list[Weight]:
    small, large = _random(48, 160) / 7, _random(LARGE, 2 * LARGE) / LARGE**0.5
    return [fastest(small), fastest(large), *([packed(small, 1)] if can_pack() else [])]


def test_large_weights_are_packed_where_they_can_be() -> None:
    small, large = fastest(_random(64, 64)), fastest(_random(LARGE, LARGE))
    assert large.plain.nbytes >= LARGE_BYTES > small.plain.nbytes
    assert small.packed is None
    assert (large.packed is not None) == can_pack()


@pytest.mark.parametrize("num_padding_rows", [0, 3])
@pytest.mark.parametrize("num_rows", SIZES)
def test_products_equal_float64_whatever_the_rows(num_rows: int, num_padding_rows: int) -> None:
    for weight in _weights():
        inner, outer = weight.plain.shape
        # Rows and sums lie in wider buffers, as those of a network do.
        rows = _random(num_rows + num_padding_rows, inner + 8, seed=1)[:, :inner]
        sums = _random(num_rows + num_padding_rows, outer + 8, seed=2)[:, 8:]
        bias = _random(outer, seed=3)
        product = (rows.double() @ weight.plain.double())[:num_rows]
        expected = sums[:num_rows].double() + product
        sizes = [outer // 2, outer // 4, outer - outer // 2 - outer // 4]
        parts = bind_add(weight, rows, sums.clone(), num_rows, sizes)()
        for part, wanted in zip(parts, torch.split(expected, sizes, dim=1), strict=True):
            torch.testing.assert_close(part.double(), wanted, atol=1e-5, rtol=0)
        biased = bind_biased(weight, bias, rows, torch.empty(len(rows), outer), num_rows)()
        torch.testing.assert_close(biased.double(), bias + product, atol=1e-5, rtol=0)
        filled = torch.full((len(rows), outer), torch.nan)
        bind_fill(weight, bias, rows, filled, num_rows)()
        torch.testing.assert_close(filled[:num_rows].double(), bias + product, atol=1e-5, rtol=0)


def _load(directory: Path, *, deterministic: bool = False, max_batch: int = 80) -> Stepper:
    stepper = load_stepper(
        directory,
        name="tiny",
        version=1,
        device="cpu",
        num_slots=100,
        max_batch=max_batch,
        deterministic=deterministic,
    )
    stepper.warm_up()
    return stepper


def _submit(stepper: Stepper, slots: list[int], inputs: NDArray[np.generic], num_tokens: int, want: int) -> None:
    """Advance each slot by `num_tokens` tokens. inputs: (B, T), or (B, T, I)."""
    tokens = inputs.reshape(len(slots) * num_tokens, *inputs.shape[2:])
    given = tokens.astype(np.uint32) if inputs.ndim == 2 else tokens.astype(np.float32)
    wants = np.full(len(given), want, np.uint8)
    stepper.collect(stepper.submit(np.array(slots), np.full(len(slots), num_tokens), given, wants, 0))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("hidden_size", "num_layers", "kind"), [(LARGE, 1, "tokens"), (LARGE, 2, "vectors")])
@pytest.mark.parametrize("cell", CELLS)
def test_large_cells_equal_the_transcription_at_every_number_of_rows(
    tmp_path: Path, cell: str, hidden_size: int, num_layers: int, kind: str, deterministic: bool
) -> None:
    is_tokens = kind == "tokens"
    directory = write_tiny_model(
        tmp_path,
        cell,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=11 if is_tokens else None,
        input_size=None if is_tokens else 5,
    )
    stepper, oracle, random = _load(directory, deterministic=deterministic), Oracle(directory), np.random.default_rng(0)
    for size in SIZES:
        slots = random.permutation(np.arange(1, 81))[:size].tolist()
        stepper.zero_rows(np.array(slots))
        shape = (size, 3)
        inputs = random.integers(0, 11, shape) if is_tokens else random.standard_normal((*shape, 5)).astype(np.float32)
        _submit(stepper, slots, inputs[:, :1], 1, 0)
        _submit(stepper, slots, inputs[:, 1:], 2, 0)
        found = stepper.read_rows(np.array(slots))
        for row in {0, size // 2, size - 1}:
            # A large random network without gates doubles a rounding at nearly every step.
            np.testing.assert_allclose(found[row], oracle.run(inputs[row]).states[-1], atol=2e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 64])
@pytest.mark.parametrize("cell", ["simplified_gru", "gru", "gru_reset_after"])
def test_a_gate_of_one_keeps_the_state_to_the_last_bit_whatever_the_rows(
    tmp_path: Path, cell: str, num_rows: int
) -> None:
    directory = write_tiny_model(tmp_path, cell, hidden_size=LARGE, input_size=1)
    tensors = load_file(directory / "model.safetensors")
    tensors["layers.0.bias"][:LARGE] = 1e4
    save_file(tensors, directory / "model.safetensors")
    stepper = _load(directory)
    slots = np.arange(1, num_rows + 1)
    states = np.random.default_rng(0).uniform(-1, 1, (num_rows, 1, LARGE)).astype(np.float32)
    stepper.write_rows(slots, states)
    for _ in range(20):
        _submit(stepper, slots.tolist(), np.ones((num_rows, 1, 1)), 1, 0)
    assert stepper.read_rows(slots).tobytes() == states.tobytes()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("numbers_at_once", [1, 10**9])
def test_vectors_multiplied_for_many_steps_give_what_one_step_after_another_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, numbers_at_once: int
) -> None:
    directory = write_tiny_model(tmp_path, "gru", num_layers=2, hidden_size=20, input_size=6)
    monkeypatch.setattr(workspace_module, "_MAX_PROJECTED_NUMBERS", numbers_at_once)
    stepper = _load(directory, deterministic=deterministic, max_batch=8)
    counts = np.array([3, 40, 1, 17, 40])
    inputs = np.random.default_rng(0).standard_normal((int(counts.sum()), 6)).astype(np.float32)
    slots, wants = np.arange(1, 6), np.zeros(len(inputs), np.uint8)
    stepper.collect(stepper.submit(slots, counts, inputs, wants, 0))
    together = stepper.read_rows(slots)
    stepper.zero_rows(slots)
    for row, end in enumerate(np.cumsum(counts)):
        for token in range(end - counts[row], end):
            _submit(stepper, [row + 1], inputs[None, token : token + 1], 1, 0)
    alone = stepper.read_rows(slots)
    if deterministic:
        assert together.tobytes() == alone.tobytes()
    np.testing.assert_allclose(together, alone, atol=2e-6)


@pytest.mark.parametrize("num_rows", [1, 64])
def test_ticks_allocate_nothing_that_stays(tmp_path: Path, num_rows: int) -> None:
    directory = write_tiny_model(tmp_path, "gru", hidden_size=LARGE, vocab_size=16, output_size=16)
    stepper, random = _load(directory), np.random.default_rng(0)
    slots = list(range(1, num_rows + 1))

    def ticks(count: int) -> int:
        for _ in range(count):
            _submit(stepper, slots, random.integers(0, 16, (num_rows, 1)), 1, Want.NEXT_TOKEN)
        gc.collect()
        return _resident_bytes()

    before = ticks(100)
    assert ticks(600) - before < 2**20  # one vector of the gates kept a tick would be 2 MiB and more


def _resident_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
