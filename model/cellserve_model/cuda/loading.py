"""Makes the stepper of a GPU from a model's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.cuda.graphs import Capture, capture_in_one_pool
from cellserve_model.cuda.network import CudaNetwork
from cellserve_model.cuda.slab import CudaSlab
from cellserve_model.cuda.stepper import CudaStepper
from cellserve_model.cuda.weights import prepare_weights
from cellserve_model.ticks import ModelInfo

__all__ = ["make_stepper"]


def make_stepper(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    info: ModelInfo,
    device: torch.device,
    *,
    num_slots: int,
    max_batch: int,
    deterministic: bool,
    weight_dtype: torch.dtype,
    capture: Capture | None = None,
) -> CudaStepper:
    """Prepare the weights, make the slab and the buffers. capture: CUDA graphs, where None.

    weight_dtype: bfloat16, which the tensor cores multiply with states rounded to it, or float32, exact and many
    times slower in large batches. Raises DeviceError where there is not enough memory.
    """
    with torch.inference_mode():
        slab = CudaSlab(config, num_slots, max_batch, device)
        weights = prepare_weights(config, tensors, device, weight_dtype)
        network = CudaNetwork(config, weights, slab, max_batch, deterministic=deterministic)
        return CudaStepper(info, network, max_batch, capture or capture_in_one_pool(device))
