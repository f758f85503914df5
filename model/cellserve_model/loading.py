"""Makes a stepper from a model directory: reads, checks, folds, and allocates the slab."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from threadpoolctl import threadpool_limits

from cellserve_model.devices import choose_device
from cellserve_model.drift import MAX_DRIFT, measure_drift
from cellserve_model.errors import DeviceError, WeightsError
from cellserve_model.files import ModelFiles, read_model
from cellserve_model.interface import Stepper
from cellserve_model.products import can_bfloat16
from cellserve_model.slab import Slab
from cellserve_model.stepper import CpuStepper
from cellserve_model.ticks import ModelInfo
from cellserve_model.workspace import SteppingNetwork

__all__ = ["load_stepper"]

# On a CPU a larger batch only waits longer; a GPU is not full before.
_MAX_BATCH_CPU = 1024
_MAX_BATCH_GPU = 4096
# Drift is settled by the first hundred steps, or grows without end; a look at both tells them apart.
_DRIFT_STEPS = (100, 1000)


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
    weights: Literal["float32", "bfloat16"] | None = None,
) -> Stepper:
    """Load the model directory `<models>/<name>/<version>` and make a slab for it.

    device: auto, cpu, cuda or cuda:N. num_slots: sessions whose states fit on the device. max_batch: by
    default 1,024 on a CPU and 4,096 on a GPU. deterministic: a session's results are the same to the last bit
    whatever shares its batches; on a CPU this takes one thread. num_threads: of torch on a CPU, by default as
    torch has it; call from the thread that will drive the stepper; numpy's products take one thread from then on, in
    the whole process. weights: None for bfloat16 on a GPU, where float32 is many times slower in large batches, and
    float32 on a CPU; states and sums are float32 with both, so that states go from one kind of server to the other.
    On a CPU bfloat16 rounds the weights that hidden vectors are multiplied with, for twice the speed where they are
    large; it is refused with `deterministic`, whose bits are float32's, and where states drift by more than MAX_DRIFT,
    which takes seconds to find out. Raises WeightsError, ConfigError, ModelFileError and DeviceError.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        weight_dtype = torch.float32 if weights == "float32" else torch.bfloat16
        return _load_on_gpu(
            read_model(directory), name, version, chosen, num_slots, max_batch, deterministic, weight_dtype
        )
    if deterministic:
        num_threads = 1  # how a product is split over threads depends on its rows
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    # numpy's own: its threads wake for every product of a lone row, and cost more than they save.
    threadpool_limits(1, user_api="blas")
    if weights == "bfloat16":
        _check_bfloat16(deterministic=deterministic)
    files = read_model(directory)
    max_batch = max_batch or _MAX_BATCH_CPU
    with torch.inference_mode():
        network = SteppingNetwork(
            files.config,
            files.tensors,
            max_batch,
            deterministic=deterministic,
            bfloat16=weights == "bfloat16",
        )
        if weights == "bfloat16":
            _check_drift(f"{name} version {version}", network, files)
        slab = Slab(files.config, num_slots, network.width)
        return CpuStepper(_information(files, name, version, chosen), network, slab, num_threads=num_threads)


def _load_on_gpu(
    files: ModelFiles,
    name: str,
    version: int,
    device: torch.device,
    num_slots: int,
    max_batch: int | None,
    deterministic: bool,
    weight_dtype: torch.dtype,
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
        weight_dtype=weight_dtype,
    )


def _check_bfloat16(*, deterministic: bool) -> None:
    if deterministic:
        raise WeightsError("bfloat16 weights go without deterministic: the bits it promises are those of float32")
    if not can_bfloat16():
        raise WeightsError(
            "bfloat16 weights need a processor with AVX-512 BF16; without it they are slower than float32"
        )


def _check_drift(title: str, network: SteppingNetwork, files: ModelFiles) -> None:
    drifts = measure_drift(network, files.config, files.tensors, _DRIFT_STEPS)
    if max(drifts) > MAX_DRIFT:
        found = ", ".join(f"{drift:.4f} after {steps}" for steps, drift in zip(_DRIFT_STEPS, drifts, strict=True))
        raise WeightsError(f"{title} drifts with bfloat16 weights: {found} steps, {MAX_DRIFT} is allowed; use float32")


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
