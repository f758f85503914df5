"""Measures how far rounded weights lead states away from those of the model itself, computed in float64.

Symbols: B sessions, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.network import Network
from cellserve_model.workspace import SteppingNetwork

__all__ = ["MAX_DRIFT", "measure_drift"]

MAX_DRIFT: Final = 0.01
_NUM_SESSIONS: Final = 4


def measure_drift(
    network: SteppingNetwork, config: ModelConfig, tensors: Mapping[str, Tensor], steps: Sequence[int]
) -> list[float]:
    """The drift after each of `steps`, rising numbers of tokens drawn at random, from position 0.

    Drift is the root mean square of the difference between the states, (B, L, state_size), that `network` has and
    those of the equations in float64; as a part of the latter's root mean square where that is above 1, as c of
    lstm may be. A model that forgets keeps it bounded; one that does not has a state that no rounding leaves
    alone, and drifts without end.
    """
    exact = Network.from_tensors(config, tensors).double()
    views = network.views(min(_NUM_SESSIONS, network.max_rows))
    views.states.zero_()
    num_sessions = len(views.states)
    expected = exact.zero_state(num_sessions)
    generator = torch.Generator().manual_seed(0)
    drifts = []
    for step in range(1, steps[-1] + 1):
        if config.vocab_size is not None:
            inputs = torch.randint(config.vocab_size, (num_sessions,), generator=generator)
            expected, _ = exact.step(inputs, expected)
        else:
            inputs = torch.randn(num_sessions, config.layer_input_size(0), generator=generator)
            expected, _ = exact.step(inputs.double(), expected)
        network.advance(views, inputs)
        if step in steps:
            scale = max(1.0, float(expected.square().mean().sqrt()))
            difference = views.states.view(expected.shape).double() - expected
            drifts.append(float(difference.square().mean().sqrt()) / scale)
    views.states.zero_()
    return drifts
