"""Makes GPU steppers of tiny models, on the interpreter where there is no GPU; and their oracle, rounded alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from cellserve_model import ModelInfo, read_model
from cellserve_model.cuda.loading import make_stepper
from cellserve_model.cuda.stepper import CudaStepper
from tests.support.interpreter import DEVICE, IS_INTERPRETED

__all__ = ["make_cuda_stepper", "round_weights"]


def make_cuda_stepper(
    directory: Path,
    *,
    max_batch: int = 20,
    num_slots: int = 32,
    deterministic: bool = False,
    weight_dtype: torch.dtype = torch.float32,
) -> CudaStepper:
    """The stepper of a GPU, whatever device there is."""
    files = read_model(directory)
    config = files.config
    info = ModelInfo(
        name="tiny",
        version=1,
        fingerprint=files.fingerprint,
        cell=config.cell,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        input_kind="vectors" if config.vocab_size is None else "tokens",
        vocab_size=config.vocab_size,
        input_size=config.input_size,
        output_size=config.output_size,
        gate_names=config.spec.gate_names,
        num_parameters=0,
        device=str(DEVICE),
    )
    return make_stepper(
        config,
        files.tensors,
        info,
        DEVICE,
        num_slots=num_slots,
        max_batch=max_batch,
        deterministic=deterministic,
        weight_dtype=weight_dtype,
        capture=(lambda launch: launch) if IS_INTERPRETED else None,
    )


def round_weights(directory: Path) -> None:
    """Round a model's matrices to bfloat16 in its file, so that a stepper of bfloat16 weights rounds nothing more."""
    tensors = load_file(directory / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 2:
            tensors[name] = torch.from_numpy(np.array(values)).bfloat16().float().numpy()
    save_file(tensors, directory / "model.safetensors")
