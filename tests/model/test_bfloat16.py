"""Weights rounded to bfloat16: how far states drift from float64, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cellserve_model import (
    CELLS,
    ModelConfig,
    ModelFiles,
    Network,
    TokenInput,
    VectorInput,
    WeightsError,
    bundled_models_directory,
    load_stepper,
    read_model,
)
from cellserve_model import loading as loading_module
from cellserve_model.drift import MAX_DRIFT, measure_drift
from cellserve_model.products import can_bfloat16
from cellserve_model.workspace import SteppingNetwork
from tests.support.models import write_tiny_model

needs_bfloat16 = pytest.mark.skipif(not can_bfloat16(), reason="this processor has no AVX-512 BF16")


def _drifts(files: ModelFiles, steps: tuple[int, ...], *, bfloat16: bool = True) -> list[float]:
    with torch.inference_mode():
        network = SteppingNetwork(files.config, files.tensors, 8, deterministic=False, bfloat16=bfloat16)
        return measure_drift(network, files.config, files.tensors, steps)


def _random_model(directory: Path, cell: str, *, num_layers: int = 1, hidden_size: int = 96) -> ModelFiles:
    Network(ModelConfig(cell, num_layers, hidden_size, TokenInput(64, 16)), seed=5).save(directory)
    return read_model(directory)


@needs_bfloat16
def test_the_bundled_model_stays_within_the_limit_over_a_thousand_steps() -> None:
    files = read_model(bundled_models_directory() / "pycode" / "1")
    drifts = _drifts(files, (10, 100, 1000))
    assert min(drifts) > 1e-4  # it is rounded
    assert max(drifts) <= MAX_DRIFT


@needs_bfloat16
@pytest.mark.parametrize("cell", CELLS)
def test_drift_after_ten_thousand_steps_is_that_after_a_hundred(tmp_path: Path, cell: str) -> None:
    early, later, last = _drifts(_random_model(tmp_path, cell), (100, 1000, 10_000))
    assert 1e-5 < early <= MAX_DRIFT
    assert max(later, last) <= 2 * early


def test_float32_states_do_not_drift(tmp_path: Path) -> None:
    assert max(_drifts(_random_model(tmp_path, "gru"), (100, 1000), bfloat16=False)) < 1e-6


@needs_bfloat16
def test_stacked_layers_and_vectors_are_rounded_as_well(tmp_path: Path) -> None:
    Network(ModelConfig("gru", 2, 64, VectorInput(7), 5), seed=2).save(tmp_path)
    exact, close = (
        load_stepper(tmp_path, name="m", version=1, device="cpu", num_slots=4, weights=weights)
        for weights in ("float32", "bfloat16")
    )
    tokens = np.random.default_rng(0).standard_normal((90, 7)).astype(np.float32)
    for stepper in (exact, close):
        stepper.collect(stepper.submit(np.array([2, 1]), np.array([50, 40]), tokens, np.zeros(90, np.uint8), 0))
    found, expected = (stepper.read_rows(np.array([1, 2])) for stepper in (close, exact))
    assert 1e-5 < np.abs(found - expected).max() < 0.02
    # A state of one kind of server goes on in the other.
    exact.write_rows(np.array([3]), found[:1])
    assert exact.read_rows(np.array([3])).tobytes() == found[:1].tobytes()


@needs_bfloat16
def test_a_model_that_drifts_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "vanilla_rnn", hidden_size=64, vocab_size=8)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.recurrent_weight"] *= 3  # far beyond the edge of chaos
    save_file(tensors, path)
    with pytest.raises(
        WeightsError, match=r"m version 1 drifts with bfloat16 weights: .* after 100, .* after 1000 steps"
    ):
        load_stepper(tmp_path, name="m", version=1, device="cpu", num_slots=4, weights="bfloat16")
    load_stepper(tmp_path, name="m", version=1, device="cpu", num_slots=4)


def test_what_cannot_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=8)
    with pytest.raises(WeightsError, match="without deterministic"):
        load_stepper(tmp_path, name="m", version=1, device="cpu", num_slots=4, weights="bfloat16", deterministic=True)
    monkeypatch.setattr(loading_module, "can_bfloat16", lambda: False)
    with pytest.raises(WeightsError, match="AVX-512 BF16"):
        load_stepper(tmp_path, name="m", version=1, device="cpu", num_slots=4, weights="bfloat16")
