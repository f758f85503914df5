"""Makes a stepper from a model directory: reads, checks, folds, and allocates the slab."""

from __future__ import annotations

from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from cellserve_model.devices import choose_device
from cellserve_model.errors import DeviceError
from cellserve_model.files import ModelFiles, read_model
from cellserve_model.interface import Stepper
from cellserve_model.slab import Slab
from cellserve_model.stepper import CpuStepper
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
    weight_dtype: torch.dtype | None = None,
) -> Stepper:
    """Load the model directory `<models>/<name>/<version>` and make a slab for it.

    device: auto, cpu, cuda or cuda:N. num_slots: sessions whose states fit on the device. max_batch: by
    default 128 on a CPU and 4,096 on a GPU. deterministic: a session's results are the same to the last bit
    whatever shares its batches; on a CPU this takes one thread. num_threads: of torch on a CPU, by default as
    torch has it; call from the thread that will drive the stepper; numpy's products take one thread from then on, in
    the whole process. weight_dtype: on a GPU bfloat16, the default, or float32, which is many times slower in large
    batches; states and sums are float32 with both. Raises ConfigError, ModelFileError and DeviceError.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return _load_on_gpu(
            read_model(directory), name, version, chosen, num_slots, max_batch, deterministic, weight_dtype
        )
    if weight_dtype not in (None, torch.float32):
        raise DeviceError(f"weights of {weight_dtype} need a GPU; those of a CPU are float32")
    if deterministic:
        num_threads = 1  # how a product is split over threads depends on its rows
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if chosen.type == "cpu":
        # numpy's own: its threads wake for every product of a lone row, and cost more than they save.
        threadpool_limits(1, user_api="blas")
    files = read_model(directory)
    max_batch = max_batch or _MAX_BATCH_CPU
    with torch.inference_mode():
        network = SteppingNetwork(files.config, files.tensors, chosen, max_batch, deterministic=deterministic)
        slab = Slab(files.config, num_slots, network.width, chosen)
        return CpuStepper(_information(files, name, version, chosen), network, slab, num_threads=num_threads)


def _load_on_gpu(
    files: ModelFiles,
    name: str,
    version: int,
    device: torch.device,
    num_slots: int,
    max_batch: int | None,
    deterministic: bool,
    weight_dtype: torch.dtype | None,
) -> Stepper:
    try:
        from triton.runtime import driver

        from cellserve_model.cuda.loading import make_stepper
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise DeviceError(
            f"device {str(device)!r} needs the package triton, which CUDA builds of torch bring"
        ) from None
    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever a compiler or a driver says
        raise DeviceError(
            f"Triton cannot use device {str(device)!r}; it needs a C compiler (gcc or clang) and the C library's "
            f"headers, with which it builds its launcher once: {error}"
        ) from error
    return make_stepper(
        files.config,
        files.tensors,
        _information(files, name, version, device),
        device,
        num_slots=num_slots,
        max_batch=max_batch or _MAX_BATCH_GPU,
        deterministic=deterministic,
        weight_dtype=weight_dtype or torch.bfloat16,
    )


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
