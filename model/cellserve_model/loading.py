"""Makes a stepper from a model directory: reads, checks, folds, and allocates the slab."""

from __future__ import annotations

from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from cellserve_model.devices import choose_device
from cellserve_model.files import ModelFiles, read_model
from cellserve_model.slab import Slab
from cellserve_model.stepper import Stepper
from cellserve_model.ticks import ModelInfo
from cellserve_model.workspace import SteppingNetwork

__all__ = ["load_stepper"]

# On a CPU a larger batch only waits longer; a GPU is not full before.
_MAX_BATCH_CPU = 128
_MAX_BATCH_GPU = 4096


def load_stepper(
    directory: Path,
    *,
    name: str,
    version: int,
    device: str = "auto",
    num_slots: int,
    max_batch: int | None = None,
    deterministic: bool = False,
    num_threads: int | None = None,
) -> Stepper:
    """Load the model directory `<models>/<name>/<version>` and make a slab for it.

    device: auto, cpu, cuda or cuda:N. num_slots: sessions whose states fit on the device. max_batch: by
    default 128 on a CPU and 4,096 on a GPU. deterministic: a session's results are the same to the last bit
    whatever shares its batches; on a CPU this takes one thread. num_threads: of torch on a CPU, by default as
    torch has it; call from the thread that will drive the stepper. numpy's products take one thread from then on, in
    the whole process. Raises ConfigError, ModelFileError and
    DeviceError.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("highest")  # float32 states are promised, not TF32's 10 bits of them
    elif deterministic:
        num_threads = 1  # how a product is split over threads depends on its rows
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if chosen.type == "cpu":
        # numpy's own: its threads wake for every product of a lone row, and cost more than they save.
        threadpool_limits(1, user_api="blas")
    files = read_model(directory)
    if max_batch is None:
        max_batch = _MAX_BATCH_CPU if chosen.type == "cpu" else _MAX_BATCH_GPU
    with torch.inference_mode():
        network = SteppingNetwork(files.config, files.tensors, chosen, max_batch, deterministic=deterministic)
        slab = Slab(files.config, num_slots, network.width, chosen)
        return Stepper(_information(files, name, version, chosen), network, slab, num_threads=num_threads)


def _information(files: ModelFiles, name: str, version: int, device: torch.device) -> ModelInfo:
    config = files.config
    return ModelInfo(
        name=name,
        version=version,
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
        num_parameters=sum(tensor.numel() for tensor in files.tensors.values()),
        device=str(device),
    )
