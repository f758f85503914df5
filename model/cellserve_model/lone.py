"""Advances a single row on the CPU, where calls and not arithmetic take the time beside the reading of weights.

The same equations as in kernels.py in numpy's terms: a call costs about half of torch's, and OpenBLAS reads a
weight for one row at nearly the speed of the memory, MKL at two thirds of it (bench/NOTES.md). The sigmoid and
the interpolation stay torch's: numpy has no sigmoid, and torch.lerp keeps a state exactly where a gate is 1.
All arrays share their memory with the buffers of the batch. Symbols: H hidden size, G row blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.kernels import LayerViews, PreparedLayer

__all__ = ["bind_lone", "bind_lone_fill"]

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Row:
    """The buffers of the one row as arrays of one dimension. sums: (G*H), W_x x_t + b on entry."""

    sums: Array
    blocks: list[Array]
    hidden: Array
    scratch: Array


def bind_lone(cell: str, layer: PreparedLayer, views: LayerViews, products: Tensor) -> Callable[[], None]:
    """A function that advances one layer of one row by one token.

    views: of one row. products: (1, G*H), the buffer of its blocks, with W_x x_t + b on entry.
    """
    row = _Row(
        sums=products[0].numpy(),
        blocks=[block[0].numpy() for block in views.blocks],
        hidden=views.new_hidden[0].numpy(),
        scratch=views.scratch[0].numpy(),
    )
    return _CELLS[cell](layer, views, row)


def bind_lone_fill(weight: Tensor, bias: Tensor, below: Tensor, products: Tensor) -> Callable[[], None]:
    """A function that puts W_x x_t + b into `products`.

    weight: (D, G*H). bias: (G*H,). below: (1, D), what the layer is given. products: (1, G*H).
    """
    given, array, added, sums = below[0].numpy(), weight.numpy(), bias.numpy(), products[0].numpy()

    def fill() -> None:
        np.dot(given, array, out=sums)
        np.add(sums, added, out=sums)

    return fill


def _product(weight: Tensor, row: Array, sums: Array) -> Callable[[], None]:
    """A function that adds row W to sums. weight: (K, N). row: (K,). sums: (N,)."""
    array, product = weight.numpy(), np.empty_like(sums)

    def add() -> None:
        np.dot(row, array, out=product)
        np.add(sums, product, out=sums)

    return add


def _vanilla_rnn(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    add = _product(layer.recurrent_weights[0], row.hidden, row.sums)

    def advance() -> None:
        add()
        np.tanh(row.sums, out=row.hidden)

    return advance


def _leaky_rnn(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    add = _product(layer.recurrent_weights[0], row.hidden, row.sums)
    assert layer.leak is not None
    leak, candidate, hidden = layer.leak, views.blocks[0], views.new_hidden

    def advance() -> None:
        add()
        np.tanh(row.sums, out=row.sums)
        torch.lerp(candidate, hidden, leak, out=hidden)

    return advance


def _simplified_gru(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    add = _product(layer.recurrent_weights[0], row.hidden, row.sums)
    candidate_array = row.blocks[1]
    (forget, candidate), hidden = views.blocks, views.new_hidden

    def advance() -> None:
        add()
        torch.sigmoid(forget, out=forget)
        np.tanh(candidate_array, out=candidate_array)
        torch.lerp(candidate, hidden, forget, out=hidden)

    return advance


def _gru(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    width = len(row.hidden)
    gate_weight, candidate_weight = layer.recurrent_weights
    _, reset_array, candidate_array = row.blocks
    add_gates = _product(gate_weight, row.hidden, row.sums[: 2 * width])
    add_candidate = _product(candidate_weight, row.scratch, candidate_array)
    (update, _, candidate), gates, hidden = views.blocks, views.gates, views.new_hidden

    def advance() -> None:
        add_gates()
        torch.sigmoid(gates, out=gates)
        # The reset gate acts before the product, as in Cho et al. (2014).
        np.multiply(reset_array, row.hidden, out=row.scratch)
        add_candidate()
        np.tanh(candidate_array, out=candidate_array)
        torch.lerp(candidate, hidden, update, out=hidden)

    return advance


def _gru_reset_after(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    assert layer.recurrent_bias is not None
    width = len(row.hidden)
    gate_weight, candidate_weight = layer.recurrent_weights
    weight, bias = candidate_weight.numpy(), layer.recurrent_bias.numpy()
    _, reset_array, candidate_array = row.blocks
    add_gates = _product(gate_weight, row.hidden, row.sums[: 2 * width])
    (update, _, candidate), gates, hidden = views.blocks, views.gates, views.new_hidden

    def advance() -> None:
        add_gates()
        torch.sigmoid(gates, out=gates)
        np.dot(row.hidden, weight, out=row.scratch)
        np.add(row.scratch, bias, out=row.scratch)
        np.multiply(row.scratch, reset_array, out=row.scratch)
        np.add(candidate_array, row.scratch, out=candidate_array)
        np.tanh(candidate_array, out=candidate_array)
        torch.lerp(candidate, hidden, update, out=hidden)

    return advance


def _lstm(layer: PreparedLayer, views: LayerViews, row: _Row) -> Callable[[], None]:
    assert views.memory is not None
    add = _product(layer.recurrent_weights[0], row.hidden, row.sums)
    enter_array, forget_array, candidate_array, output_array = row.blocks
    memory, gates, output = views.memory[0].numpy(), views.gates, views.blocks[3]

    def advance() -> None:
        add()
        torch.sigmoid(gates, out=gates)
        torch.sigmoid(output, out=output)
        np.tanh(candidate_array, out=candidate_array)
        np.multiply(memory, forget_array, out=memory)
        np.multiply(candidate_array, enter_array, out=candidate_array)
        np.add(memory, candidate_array, out=memory)
        np.tanh(memory, out=row.hidden)
        np.multiply(row.hidden, output_array, out=row.hidden)

    return advance


_CELLS: dict[str, Callable[[PreparedLayer, LayerViews, _Row], Callable[[], None]]] = {
    "vanilla_rnn": _vanilla_rnn,
    "leaky_rnn": _leaky_rnn,
    "simplified_gru": _simplified_gru,
    "gru": _gru,
    "gru_reset_after": _gru_reset_after,
    "lstm": _lstm,
}
