"""The six cells as differentiable torch functions: the definition that all other forms agree with.

Every function advances one layer by one token: `cell(inputs, state, layer) -> (state, gates)` with inputs:
(B, G*H) float32, W_x x_t + b with the blocks in file order; state: (B, state_size), h, for lstm h then c;
returns the new state and the gates (B, num_gates, H), or None where the cell has none.
Symbols: B batch, H hidden size, G row blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["EQUATIONS", "LayerWeights"]


class LayerWeights(Protocol):
    """What the equations need of a layer; the tensors are named and shaped as in the model file."""

    recurrent_weight: Tensor  # (G*H, H)
    recurrent_bias: Tensor | None  # (H,)
    leak: Tensor | None  # ()


Equations = Callable[[Tensor, Tensor, LayerWeights], tuple[Tensor, Tensor | None]]


def vanilla_rnn(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """h_t = tanh(W_h h_{t-1} + W_x x_t + b). Elman 1990."""
    return torch.tanh(inputs + state @ layer.recurrent_weight.t()), None


def leaky_rnn(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """g = tanh(W_h h_{t-1} + W_x x_t + b); h_t = (1 - lambda) g + lambda h_{t-1}; lambda is one scalar.

    Jaeger et al. 2007, "Optimization and applications of echo state networks with leaky-integrator neurons".
    """
    assert layer.leak is not None
    leak = layer.leak
    candidate = torch.tanh(inputs + state @ layer.recurrent_weight.t())
    hidden = (1 - leak) * candidate + leak * state
    return hidden, leak.expand_as(hidden).unsqueeze(1)


def simplified_gru(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """f = sigma(...); g = tanh(...); h_t = f * h_{t-1} + (1 - f) * g. A GRU with the forget gate alone."""
    forget_in, candidate_in = (inputs + state @ layer.recurrent_weight.t()).chunk(2, dim=1)  # (B, H) each
    forget = torch.sigmoid(forget_in)
    return forget * state + (1 - forget) * torch.tanh(candidate_in), forget.unsqueeze(1)


def gru(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """z, r = sigma(...); g = tanh(W_xg x_t + W_hg (r * h_{t-1}) + b_g); h_t = z * h_{t-1} + (1 - z) * g.

    The reset gate acts before the product: Cho et al. 2014, eq. 5-8; ONNX `linear_before_reset=0`.
    """
    size = state.shape[1]
    gate_weight, candidate_weight = torch.split(layer.recurrent_weight, [2 * size, size])  # (2H, H), (H, H)
    gates = torch.sigmoid(inputs[:, : 2 * size] + state @ gate_weight.t())  # (B, 2H)
    update, reset = gates.chunk(2, dim=1)
    candidate = torch.tanh(inputs[:, 2 * size :] + (reset * state) @ candidate_weight.t())
    return update * state + (1 - update) * candidate, gates.view(-1, 2, size)


def gru_reset_after(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """As `gru` with g = tanh(W_xg x_t + b_xg + r * (W_hg h_{t-1} + b_hg)): torch.nn.GRU, cuDNN, Keras."""
    assert layer.recurrent_bias is not None
    size = state.shape[1]
    product = state @ layer.recurrent_weight.t()  # (B, 3H)
    gates = torch.sigmoid(inputs[:, : 2 * size] + product[:, : 2 * size])
    update, reset = gates.chunk(2, dim=1)
    candidate = torch.tanh(inputs[:, 2 * size :] + reset * (product[:, 2 * size :] + layer.recurrent_bias))
    return update * state + (1 - update) * candidate, gates.view(-1, 2, size)


def lstm(inputs: Tensor, state: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """c_t = f * c_{t-1} + i * g; h_t = o * tanh(c_t). Gers et al. 2000; torch.nn.LSTM."""
    hidden, memory = state.chunk(2, dim=1)  # (B, H) each
    blocks = (inputs + hidden @ layer.recurrent_weight.t()).chunk(4, dim=1)
    enter, forget, output = (torch.sigmoid(blocks[block]) for block in (0, 1, 3))
    memory = forget * memory + enter * torch.tanh(blocks[2])
    hidden = output * torch.tanh(memory)
    return torch.cat((hidden, memory), dim=1), torch.stack((enter, forget, output), dim=1)


EQUATIONS: dict[str, Equations] = {
    "vanilla_rnn": vanilla_rnn,
    "leaky_rnn": leaky_rnn,
    "simplified_gru": simplified_gru,
    "gru": gru,
    "gru_reset_after": gru_reset_after,
    "lstm": lstm,
}
