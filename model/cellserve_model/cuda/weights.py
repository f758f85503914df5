"""Prepares a model's weights for the kernels: folded, padded to whole tiles, rounded and put on the device.

Symbols: L layers, H hidden size and W its padded width, G row blocks, V vocabulary, I input size and I' its
padded width, O outputs and O' their padded number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cellserve_model.config import ModelConfig
from cellserve_model.cuda.tiles import padded_width

__all__ = ["CudaWeights", "prepare_weights"]

_ROWS_FOLDED_AT_ONCE = 4096  # bounds the float64 copy of a large vocabulary


@dataclass(frozen=True, slots=True)
class CudaWeights:
    """All weights of a model; weights proper are bfloat16 or float32, the rest is float32.

    table: (V, G*W), the input side of each id, bias included; None for vectors. first_weight: (G, W, I'), the
    input weights of the first layer; None for tokens. input_weights: (L - 1, G, W, W), those of the layers
    above. Padded rows and columns are zero, and padded outputs have the bias -inf.
    """

    table: Tensor | None
    first_weight: Tensor | None
    input_weights: Tensor
    recurrent_weights: Tensor  # (L, G, W, W)
    biases: Tensor  # (L, G, W)
    recurrent_biases: Tensor  # (L, W)
    leaks: Tensor  # (L,)
    head_weight: Tensor | None  # (1, O', W)
    head_bias: Tensor | None  # (O',)

    @property
    def is_full(self) -> bool:
        return self.recurrent_weights.dtype == torch.float32


def prepare_weights(
    config: ModelConfig, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> CudaWeights:
    """Prepare the tensors of a model file. dtype: of the weights proper, bfloat16 or float32."""
    blocks, width = config.spec.num_blocks, padded_width(config.hidden_size)
    layers = range(config.num_layers)

    def packed(name: str, columns: int) -> Tensor:
        return _pad(tensors[name].view(blocks, config.hidden_size, -1), width, columns).to(device, dtype)

    def vectors(name: str, count: int) -> Tensor:
        found = [tensors.get(f"layers.{layer}.{name}") for layer in layers]
        rows = [torch.zeros(count, width) if one is None else _pad(one.view(count, -1), width) for one in found]
        return torch.stack(rows).to(device)

    table = first_weight = head_weight = head_bias = None
    if config.vocab_size is None:
        first_weight = packed("layers.0.input_weight", padded_width(config.layer_input_size(0)))
    else:
        table = _fold(tensors, blocks, width, dtype).to(device)
    above = [packed(f"layers.{layer}.input_weight", width) for layer in layers[1:]]
    leaks = [tensors.get(f"layers.{layer}.leak") for layer in layers]
    if config.output_size is not None:
        outputs = padded_width(config.output_size)
        head_weight = _pad(tensors["head.weight"].unsqueeze(0), outputs, width).to(device, dtype)
        head_bias = torch.full((outputs,), -torch.inf)
        head_bias[: config.output_size] = tensors["head.bias"]
        head_bias = head_bias.to(device)
    return CudaWeights(
        table=table,
        first_weight=first_weight,
        input_weights=torch.stack(above) if above else torch.empty(0, dtype=dtype, device=device),
        recurrent_weights=torch.stack([packed(f"layers.{layer}.recurrent_weight", width) for layer in layers]),
        biases=vectors("bias", blocks),
        recurrent_biases=vectors("recurrent_bias", 1).squeeze(1),
        leaks=torch.tensor([0.0 if leak is None else float(leak) for leak in leaks], device=device),
        head_weight=head_weight,
        head_bias=head_bias,
    )


def _fold(tensors: dict[str, Tensor], blocks: int, width: int, dtype: torch.dtype) -> Tensor:
    """The table (V, G*W) of W_x embedding + b, summed in float64 and rounded once."""
    embedding, bias = tensors["embedding"], tensors["layers.0.bias"].double()
    weight = tensors["layers.0.input_weight"].double().t()
    table = torch.zeros(len(embedding), blocks, width, dtype=dtype)
    for first in range(0, len(embedding), _ROWS_FOLDED_AT_ONCE):
        ids = slice(first, first + _ROWS_FOLDED_AT_ONCE)
        exact = torch.addmm(bias, embedding[ids].double(), weight)
        table[ids, :, : len(bias) // blocks] = exact.view(len(exact), blocks, -1).to(dtype)
    return table.flatten(1)


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """Pad the last dimensions with zeros to `sizes`."""
    margins = [margin for size, old in zip(sizes[::-1], tensor.shape[::-1], strict=False) for margin in (0, size - old)]
    return functional.pad(tensor, margins)
