"""Samples tokens, with random numbers that depend on (seed, position) and on nothing else.

Philox4x32-10: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". Because it is a
function of seed and position, a generation gives the same tokens however it is cut into ticks and whatever
shares them.
Symbols: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SamplingSettings", "philox4x32", "sample", "uniforms"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. All words: int64 tensors of one shape, in [0, 2^32). Returns four more."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The product of two 32-bit words wraps in int64; its bits are still right, the mask undoes the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL_STEPS[0]) & _MASK, (k1 + _WEYL_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1). seeds, positions: int64 (bits of a uint64), one shape. Returns float64."""
    zero = torch.zeros_like(positions)
    counter = (positions & _MASK, (positions >> 32) & _MASK, zero, zero)
    words = philox4x32(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    bits = ((words[0] >> 5) << 26) | (words[1] >> 6)  # 27 and 26 bits
    return bits.to(torch.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How each row samples. Rows are independent: no row's token depends on another row's settings."""

    temperatures: Tensor  # (B,) float64; 0 takes the likeliest token
    top_ks: Tensor  # (B,) int64; 0 is off
    top_ps: Tensor  # (B,) float64; 1 is off
    all_greedy: bool
    any_filter: bool


def sample(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """Choose a token for each row by inverting the cumulative distribution in the order of the ids.

    logits: (B, V) float32. uniform: (B,) float64 in [0, 1). Temperature first, then top-k, then top-p over
    what is left; of equally likely tokens the one with the lower id comes first. Returns (B,) int64.
    """
    likeliest = logits.argmax(1)
    if settings.all_greedy:
        return likeliest
    is_greedy = settings.temperatures == 0
    temperatures = settings.temperatures.masked_fill(is_greedy, 1.0).unsqueeze(1)
    # float64: the tail of a float32 sum over many ids would never be sampled.
    probabilities = torch.softmax(logits.to(torch.float64) / temperatures, dim=1)  # (B, V)
    if settings.any_filter:
        probabilities = _filter(probabilities, settings)
    cumulative = probabilities.cumsum(1)
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1)  # (B,)
    # Rounding can put the target on the very end; the last token that is possible owns it.
    last_possible = (cumulative < cumulative[:, -1:]).sum(1)
    return torch.where(is_greedy, likeliest, torch.minimum(chosen, last_possible))


def _filter(probabilities: Tensor, settings: SamplingSettings) -> Tensor:
    """Zero what top-k and top-p leave out. Of tokens as likely as the last one kept, those with lower ids stay."""
    num_tokens = probabilities.shape[1]
    ordered = _sorted_descending(probabilities)  # (B, V)
    rank = torch.arange(num_tokens)
    top_ks = torch.where(settings.top_ks > 0, settings.top_ks, num_tokens).unsqueeze(1)
    within_k = rank < top_ks
    candidates = ordered * within_k
    before = candidates.cumsum(1) - candidates  # probability of all that are likelier
    top_ps = settings.top_ps.unsqueeze(1)
    inside = within_k & ((before < top_ps * candidates.sum(1, keepdim=True)) | (top_ps >= 1))
    num_kept = inside.sum(1, keepdim=True).clamp(min=1)  # the likeliest token is always possible
    least = ordered.gather(1, num_kept - 1)
    is_likelier, is_least = probabilities > least, probabilities == least
    num_least = num_kept - is_likelier.sum(1, keepdim=True)
    return probabilities * (is_likelier | (is_least & (is_least.cumsum(1) <= num_least)))


def _sorted_descending(values: Tensor) -> Tensor:
    # numpy sorts a row with vector instructions, many times as fast as torch.
    return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
