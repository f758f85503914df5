"""The limit that the cell sets: a gru stepped in process by plain torch operations on one thread.

Symbols: B batch, T time, H hidden, V vocabulary, E embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.float64 import Reference
from bench.models import VOCAB_SIZE
from cellserve_model import load_stepper

__all__ = ["generated_per_second", "most_likely_tokens", "tokens_per_second"]

Output = Literal["next_token", "logprob"]


def tokens_per_second(directory: Path, *, batch_size: int, seconds: float, output: Output = "next_token") -> float:
    """Steps of B sessions at once, embedding lookup and head included, repeated for some seconds."""
    torch.set_num_threads(1)
    step, hidden_size = _make_step(directory)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (64, batch_size)))
    with torch.inference_mode():
        hidden = torch.zeros(batch_size, hidden_size)
        num_steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            row = tokens[num_steps % len(tokens)]
            if output == "logprob":
                hidden, logits = step(row, hidden)
                logits.log_softmax(1).gather(1, row[:, None])
            else:
                hidden, logits = step(row, hidden)
                logits.argmax(1)
            num_steps += 1
        return num_steps * batch_size / (time.perf_counter() - begin)


def generated_per_second(directory: Path, *, num_sessions: int, num_tokens: int, seconds: float) -> float:
    """Tokens that our own stepper samples in process, so many in each call, for so many sessions in turn."""
    torch.set_num_threads(1)
    stepper = load_stepper(directory, name="gru", version=1, device="cpu", num_slots=num_sessions, num_threads=1)
    stepper.warm_up()
    batches = [
        np.arange(first, min(first + stepper.max_batch, num_sessions + 1))
        for first in range(1, num_sessions + 1, stepper.max_batch)
    ]
    num_sampled, position, begin = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for slots in batches:
            rows = len(slots)
            ticket = stepper.submit_generate(
                slots,
                np.full(rows, num_tokens),
                np.full(rows, position),
                np.arange(rows, dtype=np.uint64),
                np.ones(rows, np.float32),
                np.zeros(rows, np.int64),
                np.ones(rows, np.float32),
                np.full((rows, 1), -1),
            )
            num_sampled += int(stepper.collect(ticket).counts.sum())
        position += num_tokens
    return num_sampled / elapsed


def most_likely_tokens(
    directory: Path, tokens: npt.NDArray[np.int64], cell: str = "gru"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What the network answers to tokens (T, B), computed in float64.

    Returns the likeliest next token after each (T, B), and by how much its logit leads the second's (T, B).
    """
    reference = Reference.of(directory, cell)
    state = reference.zero_state(tokens.shape[1])
    best, leads = [], []
    for row in tokens:
        state = reference.advance(state, row)
        logits = reference.head(state)
        top = np.sort(logits, axis=1)
        best.append(logits.argmax(axis=1))
        leads.append(top[:, -1] - top[:, -2])
    return np.stack(best), np.stack(leads)


def _make_step(
    directory: Path,
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]:
    """The step, and its hidden size."""
    weights = load_file(directory / "model.safetensors")
    hidden_size = weights["layers.0.recurrent_weight"].shape[1]
    input_weight = weights["layers.0.input_weight"].t().contiguous()  # (E, 3H), rows of the file z, r, g
    gate_weight = weights["layers.0.recurrent_weight"][: 2 * hidden_size].t().contiguous()  # (H, 2H)
    candidate_weight = weights["layers.0.recurrent_weight"][2 * hidden_size :].t().contiguous()  # (H, H)
    head_weight = weights["head.weight"].t().contiguous()  # (H, V)

    def step(tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: (B,). hidden: (B, H). Returns the next hidden (B, H) and the logits (B, V)."""
        products = torch.addmm(weights["layers.0.bias"], weights["embedding"][tokens], input_weight)  # (B, 3H)
        gates = torch.sigmoid(torch.addmm(products[:, : 2 * hidden_size], hidden, gate_weight))  # (B, 2H)
        update, reset = gates.chunk(2, dim=1)
        # The reset gate acts before the product, as in Cho et al. (2014).
        candidate = torch.addmm(products[:, 2 * hidden_size :], reset * hidden, candidate_weight).tanh()
        hidden = candidate + update * (hidden - candidate)
        return hidden, torch.addmm(weights["head.bias"], hidden, head_weight)

    return step, hidden_size
