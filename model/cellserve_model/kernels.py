"""The stepping form of the cells: one token for every row of a batch, in place, weights prepared once.

The equations are those of equations.py, written as in-place torch operations on preallocated buffers and
products that are bound to them; a test holds the two together. Sizes marked with an apostrophe are padded: H'
with `deterministic` on to a multiple of 32, so that no row ends in the part of a vectorised loop that rounds
differently; the padding stays zero. Products run over B' rows, everything else over B, so that rows behind
the batch are never changed.
Symbols: B rows, H hidden size, G row blocks, L layers, I input size, V vocabulary, D numbers a layer is
given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellserve_model.config import ModelConfig

__all__ = [
    "LayerViews",
    "PreparedLayer",
    "advance_layer",
    "pad_to_multiple",
    "part_sizes",
    "prepare_head",
    "prepare_layers",
]


_ROWS_FOLDED_AT_ONCE = 4096  # bounds the float64 copy of a large vocabulary


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """One layer's weights as the products read them.

    table: (V, G*H'), the input side of each id, bias included, for the first layer of a token model; else
    None. input_weight: (D', G*H') and bias: (G*H'), None where there is a table. recurrent_weights: each (H',
    n*H').
    """

    table: Tensor | None
    input_weight: Tensor | None
    bias: Tensor | None
    recurrent_weights: tuple[Tensor, ...]
    recurrent_bias: Tensor | None  # (H',)
    leak: float | None


@dataclass(frozen=True, slots=True)
class LayerViews:
    """The parts of the buffers that one layer works on, for some rows, and the products bound to them.

    add: each recurrent product, which returns its sum with what stands in `blocks`, in the parts that
    `part_sizes` says, in `blocks` themselves or elsewhere. All tensors have B rows: blocks, the G blocks (B,
    H'), on entry of W_x x_t + b, then of the activations; new_hidden, h_{t-1} to overwrite with h_t; memory, c
    of lstm.
    """

    add: tuple[Callable[[], Sequence[Tensor]], ...]
    gates: Tensor  # (B, 2H'), the first two blocks
    blocks: tuple[Tensor, ...]
    new_hidden: Tensor
    memory: Tensor | None
    scratch: Tensor  # (B, H'), what the second product of gru is given


def pad_to_multiple(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def prepare_layers(config: ModelConfig, tensors: dict[str, Tensor], multiple: int) -> list[PreparedLayer]:
    """Fold, transpose and pad the weights."""
    hidden, num_blocks = config.hidden_size, config.spec.num_blocks
    padded = pad_to_multiple(hidden, multiple)
    prepared = []
    for layer in range(config.num_layers):
        part = {
            name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer}.")
        }
        table = input_weight = None
        bias: Tensor | None = _pad_blocks(part["bias"].unsqueeze(1), num_blocks, padded, 1).squeeze(1)
        if layer == 0 and config.vocab_size is not None:
            table = _fold(tensors["embedding"], part["input_weight"], part["bias"], num_blocks, padded)
            bias = None
        else:
            width = pad_to_multiple(config.layer_input_size(layer), multiple)
            input_weight = _pad_blocks(part["input_weight"], num_blocks, padded, width).t().contiguous()
        recurrent = _pad_blocks(part["recurrent_weight"], num_blocks, padded, padded)
        splits = [sum(sizes) for sizes in part_sizes(config.cell, padded)]
        recurrent_bias, leak = part.get("recurrent_bias"), part.get("leak")
        if recurrent_bias is not None:
            recurrent_bias = _pad_blocks(recurrent_bias.unsqueeze(1), 1, padded, 1).squeeze(1)
        prepared.append(
            PreparedLayer(
                table=table,
                input_weight=input_weight,
                bias=bias,
                # The way round in which MKL multiplies a small batch fastest.
                recurrent_weights=tuple(block.t().contiguous() for block in torch.split(recurrent, splits)),
                recurrent_bias=recurrent_bias,
                leak=None if leak is None else float(leak),
            )
        )
    return prepared


def prepare_head(tensors: dict[str, Tensor], multiple: int) -> tuple[Tensor, Tensor]:
    """The head as (H', O') and (O',). Padded outputs are -inf: never the likeliest, of probability zero."""
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    padded = pad_to_multiple(len(bias), multiple)
    weight = _pad_blocks(weight, 1, padded, pad_to_multiple(weight.shape[1], multiple))
    padded_bias = bias.new_full((padded,), -torch.inf)
    padded_bias[: len(bias)] = bias
    return weight.t().contiguous(), padded_bias


def part_sizes(cell: str, width: int) -> list[list[int]]:
    """The columns of each part that a cell takes its recurrent products in, product after product."""
    return [[blocks * width for blocks in parts] for parts in _PARTS[cell]]


def advance_layer(cell: str, layer: PreparedLayer, views: LayerViews) -> None:
    """Advance every row of `views` by one token; `views.blocks` then hold the gates, where there are some."""
    _KERNELS[cell](layer, views)


def _fold(embedding: Tensor, input_weight: Tensor, bias: Tensor, num_blocks: int, padded: int) -> Tensor:
    """The table (V, G*H') of W_x embedding + b, summed in float64 and rounded once."""
    table = embedding.new_zeros(len(embedding), num_blocks, padded)
    weight, added = input_weight.double().t(), bias.double()
    for first in range(0, len(embedding), _ROWS_FOLDED_AT_ONCE):
        ids = slice(first, first + _ROWS_FOLDED_AT_ONCE)
        exact = torch.addmm(added, embedding[ids].double(), weight)
        table[ids, :, : len(bias) // num_blocks] = exact.view(len(exact), num_blocks, -1)
    return table.flatten(1)


def _pad_blocks(weight: Tensor, num_blocks: int, rows: int, columns: int) -> Tensor:
    """(n*R, C) to (n*rows, columns), each block of rows padded with zeros."""
    blocks = weight.view(num_blocks, -1, weight.shape[1])
    padded = weight.new_zeros(num_blocks, rows, columns)
    padded[:, : blocks.shape[1], : blocks.shape[2]] = blocks
    return padded.flatten(0, 1)


def _tanh(source: Tensor, out: Tensor) -> Tensor:
    """The hyperbolic tangent; `source` may be `out`."""
    # numpy's takes a sixth of the time of torch's, and is right to 1.4 units in the last place.
    np.tanh(source.numpy(), out=out.numpy())
    return out


def _vanilla_rnn(layer: PreparedLayer, views: LayerViews) -> None:
    _tanh(views.add[0]()[0], out=views.new_hidden)


def _leaky_rnn(layer: PreparedLayer, views: LayerViews) -> None:
    assert layer.leak is not None
    candidate = _tanh(views.add[0]()[0], out=views.blocks[0])
    torch.lerp(candidate, views.new_hidden, layer.leak, out=views.new_hidden)


def _simplified_gru(layer: PreparedLayer, views: LayerViews) -> None:
    forget, candidate = views.blocks
    forget_sum, candidate_sum = views.add[0]()
    torch.sigmoid(forget_sum, out=forget)
    _tanh(candidate_sum, out=candidate)
    torch.lerp(candidate, views.new_hidden, forget, out=views.new_hidden)


def _gru(layer: PreparedLayer, views: LayerViews) -> None:
    update, reset, candidate = views.blocks
    torch.sigmoid(views.add[0]()[0], out=views.gates)
    # The reset gate acts before the product, as in Cho et al. (2014).
    torch.mul(reset, views.new_hidden, out=views.scratch)
    _tanh(views.add[1]()[0], out=candidate)
    torch.lerp(candidate, views.new_hidden, update, out=views.new_hidden)


def _gru_reset_after(layer: PreparedLayer, views: LayerViews) -> None:
    update, reset, candidate = views.blocks
    torch.sigmoid(views.add[0]()[0], out=views.gates)
    candidate.addcmul_(reset, views.add[1]()[0])
    _tanh(candidate, out=candidate)
    torch.lerp(candidate, views.new_hidden, update, out=views.new_hidden)


def _lstm(layer: PreparedLayer, views: LayerViews) -> None:
    assert views.memory is not None
    enter, forget, candidate, output = views.blocks
    gate_sums, candidate_sum, output_sum = views.add[0]()
    torch.sigmoid(gate_sums, out=views.gates)
    torch.sigmoid(output_sum, out=output)
    _tanh(candidate_sum, out=candidate)
    views.memory.mul_(forget).addcmul_(enter, candidate)
    _tanh(views.memory, out=views.new_hidden).mul_(output)


# Two products for gru because the second needs the first, for gru_reset_after because its sums must stay apart.
_PARTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vanilla_rnn": ((1,),),
    "leaky_rnn": ((1,),),
    "simplified_gru": ((1, 1),),
    "gru": ((2,), (1,)),
    "gru_reset_after": ((2,), (1,)),
    "lstm": ((2, 1, 1),),
}
_KERNELS: dict[str, Callable[[PreparedLayer, LayerViews], None]] = {
    "vanilla_rnn": _vanilla_rnn,
    "leaky_rnn": _leaky_rnn,
    "simplified_gru": _simplified_gru,
    "gru": _gru,
    "gru_reset_after": _gru_reset_after,
    "lstm": _lstm,
}
