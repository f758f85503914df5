"""Samples: x ~ head(h), then h = step(x, h), for all rows of a tick and a number of tokens.

Symbols: B rows, T tokens to sample, Q stop tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.sampling import SamplingSettings, sample, uniforms
from cellserve_model.slab import to_tensor
from cellserve_model.ticks import GenerateResult
from cellserve_model.workspace import RowViews, SteppingNetwork

__all__ = ["GenerateRequest", "GeneratedTensors", "generate"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """How each row of a tick samples; see CpuStepper.submit_generate."""

    num_tokens: NDArray[np.int64]  # (B,), at least 1
    positions: NDArray[np.int64]  # (B,)
    seeds: NDArray[np.uint64]  # (B,)
    temperatures: NDArray[np.float32]  # (B,)
    top_ks: NDArray[np.int64]  # (B,)
    top_ps: NDArray[np.float32]  # (B,)
    stop_tokens: NDArray[np.int64]  # (B, Q), padded with -1

    @property
    def most_tokens(self) -> int:
        """T: of any row."""
        return int(self.num_tokens.max())

    @property
    def may_end_early(self) -> bool:
        """Whether a row can have fewer tokens than another."""
        return bool((self.stop_tokens >= 0).any() or (self.num_tokens != self.num_tokens[0]).any())


@dataclass(frozen=True, slots=True)
class GeneratedTensors:
    """tokens: (T, B) int64. logprobs: (T, B) float32. counts: (B,) int64, a row's real tokens."""

    tokens: Tensor
    logprobs: Tensor
    counts: Tensor

    def to_host(self) -> GeneratedTensors:
        """Enqueue the copies to pinned host memory; the values are there once the stream has got so far."""
        return GeneratedTensors(
            tokens=self.tokens.to("cpu", non_blocking=True),
            logprobs=self.logprobs.to("cpu", non_blocking=True),
            counts=self.counts.to("cpu", non_blocking=True),
        )

    def result(self, num_padding_rows: int, compute_seconds: float) -> GenerateResult:
        """The record for whoever drives the stepper; only on the host."""
        return GenerateResult(
            tokens=self.tokens.t().numpy().astype(np.uint32),
            logprobs=self.logprobs.t().contiguous().numpy(),
            counts=self.counts.numpy(),
            num_padding_rows=num_padding_rows,
            compute_seconds=compute_seconds,
        )


def generate(network: SteppingNetwork, views: RowViews, request: GenerateRequest) -> GeneratedTensors:
    """Sample each row's tokens and leave in `views` the states after them.

    A row that has all its tokens, or whose stop token has been consumed, keeps its state from then on.
    """
    num_rows, most_tokens, may_end_early = len(request.positions), request.most_tokens, request.may_end_early
    settings = SamplingSettings(
        temperatures=to_tensor(request.temperatures.astype(np.float64)),
        top_ks=to_tensor(request.top_ks),
        top_ps=to_tensor(request.top_ps.astype(np.float64)),
        all_greedy=bool((request.temperatures == 0).all()),
        any_filter=bool(((request.top_ks > 0) | (request.top_ps < 1)).any()),
    )
    uniform = _uniforms(request)  # (T, B) float64
    stops, num_tokens = to_tensor(request.stop_tokens), to_tensor(request.num_tokens)
    tokens = torch.empty(most_tokens, num_rows, dtype=torch.int64)
    logprobs = torch.empty(most_tokens, num_rows)
    counts = torch.full((num_rows,), 0 if may_end_early else most_tokens, dtype=torch.int64)
    alive = torch.ones(num_rows, dtype=torch.bool)
    for step in range(most_tokens):
        logits = network.head(views.padded_top_hidden)  # (B', O')
        totals = torch.logsumexp(logits, dim=1)  # (B',)
        logits, totals = logits[:num_rows], totals[:num_rows]
        sampled = sample(logits, uniform[step], settings)  # (B,)
        tokens[step] = sampled
        torch.sub(logits.gather(1, sampled.unsqueeze(1)).squeeze(1), totals, out=logprobs[step])
        if not may_end_early:
            network.advance(views, sampled)
            continue
        kept = views.states.clone()
        network.advance(views, sampled)
        torch.where(alive.unsqueeze(1), views.states, kept, out=views.states)
        counts += alive
        alive &= (sampled.unsqueeze(1) != stops).all(1) & (counts < num_tokens)
        if not bool(alive.any()):
            tokens[step + 1 :].zero_()
            logprobs[step + 1 :].zero_()
            break
    return GeneratedTensors(tokens=tokens, logprobs=logprobs, counts=counts)


def _uniforms(request: GenerateRequest) -> Tensor:
    """The random number of each token, (T, B) float64: a function of the seed and the token's position."""
    positions = request.positions + np.arange(request.most_tokens)[:, None]  # (T, B)
    seeds = np.broadcast_to(request.seeds.view(np.int64), positions.shape)
    return uniforms(to_tensor(seeds), to_tensor(positions))
