"""One layer over many tokens: the loop that autograd follows, and for `gru` a hand-written backward pass.

Autograd through T steps of small operations spends most of its time between them. The `gru` that is trained
here gets its own backward pass instead: per step only the two products that depend on the next step, and the
gradient of the recurrent weights as one product over all T*B tokens at the end.
Symbols: T time, B batch, H hidden size, G row blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cellserve_model.equations import EQUATIONS, LayerWeights

__all__ = ["run_layer"]


def run_layer(cell: str, inputs: Tensor, state: Tensor, keep: Tensor | None, layer: LayerWeights) -> Tensor:
    """Advance one layer by T tokens.

    inputs: (T, B, G*H), W_x x_t + b. state: (B, state_size). keep: (T, B, 1), 0 where the state is forgotten
    after a token. Returns the state after each token: (T, B, state_size).
    """
    if cell == "gru":
        if keep is None:
            keep = inputs.new_ones(inputs.shape[0], inputs.shape[1], 1)
        states: Tensor = _GruSequence.apply(  # type: ignore[no-untyped-call]
            inputs, state, keep, layer.recurrent_weight
        )
        return states
    advance = EQUATIONS[cell]
    collected = []
    for step, products in enumerate(inputs.unbind(0)):
        state, _ = advance(products, state, layer)
        if keep is not None:
            state = state * keep[step]
        collected.append(state)
    return torch.stack(collected)


class _GruSequence(torch.autograd.Function):
    """The equations of `gru` over T tokens. Held against plain autograd by a test."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, state: Tensor, keep: Tensor, recurrent_weight: Tensor) -> Tensor:
        num_tokens, batch, rows = inputs.shape
        size = rows // 3
        gate_weight, candidate_weight = torch.split(recurrent_weight, [2 * size, size])
        # MKL multiplies small batches faster with the weights the way round that it reads them.
        gate_weight, candidate_weight = gate_weight.t().contiguous(), candidate_weight.t().contiguous()
        gates = inputs.new_empty(num_tokens, batch, 2 * size)
        candidates = inputs.new_empty(num_tokens, batch, size)
        remembered = inputs.new_empty(num_tokens, batch, size)  # r * h_{t-1}
        states = inputs.new_empty(num_tokens + 1, batch, size)
        states[0] = state
        for step in range(num_tokens):
            previous, gate, candidate = states[step], gates[step], candidates[step]
            torch.addmm(inputs[step, :, : 2 * size], previous, gate_weight, out=gate).sigmoid_()
            torch.mul(gate[:, size:], previous, out=remembered[step])
            torch.addmm(inputs[step, :, 2 * size :], remembered[step], candidate_weight, out=candidate).tanh_()
            torch.lerp(candidate, previous, gate[:, :size], out=states[step + 1]).mul_(keep[step])
        ctx.save_for_backward(gates, candidates, remembered, states, keep, recurrent_weight)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        (states_grad,) = gradients
        gates, candidates, remembered, states, keep, recurrent_weight = ctx.saved_tensors
        num_tokens, batch, size = candidates.shape
        gate_weight, candidate_weight = torch.split(recurrent_weight, [2 * size, size])
        # What does not depend on the next step, for all steps at once.
        update, reset = gates[..., :size], gates[..., size:]
        previous = states[:-1]
        candidate_factor = (1 - update) * (1 - candidates * candidates)  # dh -> da_g
        update_factor = (previous - candidates) * update * (1 - update)  # dh -> da_z
        reset_factor = previous * reset * (1 - reset)  # d(r*h) -> da_r
        inputs_grad = states.new_empty(num_tokens, batch, 3 * size)
        state_grad = states.new_zeros(batch, size)
        remembered_grad = states.new_empty(batch, size)
        for step in range(num_tokens - 1, -1, -1):
            state_grad = state_grad.add_(states_grad[step]).mul_(keep[step])
            gates_grad, candidate_grad = inputs_grad[step, :, : 2 * size], inputs_grad[step, :, 2 * size :]
            torch.mul(state_grad, candidate_factor[step], out=candidate_grad)
            torch.mm(candidate_grad, candidate_weight, out=remembered_grad)
            torch.mul(state_grad, update_factor[step], out=gates_grad[:, :size])
            torch.mul(remembered_grad, reset_factor[step], out=gates_grad[:, size:])
            state_grad.mul_(update[step]).addcmul_(remembered_grad, reset[step])
            state_grad.addmm_(gates_grad, gate_weight)
        flat = inputs_grad.view(num_tokens * batch, 3 * size)
        weight_grad = torch.cat(
            (
                flat[:, : 2 * size].t() @ previous.reshape(-1, size),
                flat[:, 2 * size :].t() @ remembered.view(-1, size),
            )
        )
        return inputs_grad, state_grad, None, weight_grad
