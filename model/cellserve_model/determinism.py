"""Chooses the shapes of product with which a row's result depends on that row alone, to the last bit.

A library picks its kernel, and with it the order of its sums, by the shape of a product: MKL's differ for 1
to 7 rows, and for many rows where the inner size is large. So rows are padded to a multiple of 8 and
multiplied in blocks, and the largest block is taken that is seen to agree with all smaller ones. No clock is
involved: the choice is the same on every start of one build on one type of processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ROW_MULTIPLE", "WIDTH_MULTIPLE", "largest_consistent_block"]

ROW_MULTIPLE = 8
# Two vectors of AVX-512, the longest unit of torch's vectorised loops: no row ends inside one.
WIDTH_MULTIPLE = 32
_BLOCKS = (64, 32, 16)


def largest_consistent_block(weights: Sequence[Tensor]) -> int:
    """The most rows that one product may have. weights: each (K, N) that rows are multiplied with."""
    by_shape = {tuple(weight.shape): weight for weight in weights}
    for block in _BLOCKS:
        if all(_is_consistent(weight, block) for weight in by_shape.values()):
            return block
    return ROW_MULTIPLE  # one shape only: nothing to differ from


def _is_consistent(weight: Tensor, block: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(block, weight.shape[0], generator=generator)
    start = torch.randn(block, weight.shape[1], generator=generator)
    bias = start[0].clone()
    added, biased = start.clone().addmm_(rows, weight), torch.addmm(bias, rows, weight)
    turned = start.flip(0).addmm_(rows.flip(0), weight).flip(0)
    if not torch.equal(turned, added):  # where in the block a row stands must not matter either
        return False
    for size in range(ROW_MULTIPLE, block, ROW_MULTIPLE):
        fewer = start[:size].clone().addmm_(rows[:size], weight)
        if not (
            torch.equal(fewer, added[:size]) and torch.equal(torch.addmm(bias, rows[:size], weight), biased[:size])
        ):
            return False
    return True
