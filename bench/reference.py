"""The limit that the cell sets: a gru stepped in process by plain torch operations on one thread.

Symbols: B batch, T time, H hidden, V vocabulary, E embedding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from cellserve_model import ModelConfig, Network, Stepper, TokenInput, Want, load_stepper

__all__ = ["VOCAB_SIZE", "most_likely_tokens", "tokens_per_second", "write_models"]

VOCAB_SIZE: Final = 256
_EMBEDDING_SIZE: Final = 96  # as the bundled model's

Output = Literal["next_token", "logprob"]


def write_models(directory: Path, hidden_sizes: tuple[int, ...]) -> None:
    """Random models gru<H>, each with a vocabulary of 256 and a head."""
    for hidden_size in hidden_sizes:
        config = ModelConfig(
            cell="gru",
            num_layers=1,
            hidden_size=hidden_size,
            input=TokenInput(vocab_size=VOCAB_SIZE, embedding_size=_EMBEDDING_SIZE),
            output_size=VOCAB_SIZE,
        )
        Network(config, seed=hidden_size).save(directory / f"gru{hidden_size}" / "1")


def tokens_per_second(
    directory: Path, *, hidden_size: int, batch_size: int, seconds: float, output: Output = "next_token"
) -> float:
    """Steps of B sessions at once, embedding lookup and head included, repeated for some seconds."""
    torch.set_num_threads(1)
    step = _make_step(directory, hidden_size, torch.float32)
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


def stepper_microseconds(
    directory: Path, *, hidden_size: int, batch_size: int, deterministic: bool, seconds: float
) -> float:
    """Processor time of our own stepper per token, with one thread and the next tokens asked for."""
    stepper = _load(directory, hidden_size, deterministic)
    rows = min(batch_size, stepper.max_batch)
    slots, counts = np.arange(1, rows + 1), np.ones(rows, np.int64)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (64, rows)).astype(np.uint32)
    wants = np.full(rows, Want.NEXT_TOKEN, np.uint8)
    num_steps, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        stepper.collect(stepper.submit(slots, counts, tokens[num_steps % len(tokens)], wants, 0))
        num_steps += 1
    return 1e6 * (time.process_time() - begin) / (num_steps * rows)


@functools.cache
def _load(directory: Path, hidden_size: int, deterministic: bool) -> Stepper:
    stepper = load_stepper(
        directory / f"gru{hidden_size}" / "1",
        name="gru",
        version=1,
        device="cpu",
        num_slots=512,
        deterministic=deterministic,
        num_threads=1,
    )
    stepper.warm_up()
    return stepper


def most_likely_tokens(
    directory: Path, hidden_size: int, tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What the network answers to tokens (T, B), computed in float64.

    Returns the likeliest next token after each (T, B), and by how much its logit leads the second's (T, B).
    """
    step = _make_step(directory, hidden_size, torch.float64)
    hidden = torch.zeros(tokens.shape[1], hidden_size, dtype=torch.float64)
    best, leads = [], []
    with torch.inference_mode():
        for row in torch.from_numpy(tokens):
            hidden, logits = step(row, hidden)
            top = logits.topk(2, dim=1)
            best.append(top.indices[:, 0])
            leads.append(top.values[:, 0] - top.values[:, 1])
    return torch.stack(best).numpy(), torch.stack(leads).numpy()


def _make_step(
    directory: Path, hidden_size: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    tensors = load_file(directory / f"gru{hidden_size}" / "1" / "model.safetensors")
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
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

    return step
