"""Chooses the shapes of product with which a row's result depends on that row alone, to the last bit.

A library picks its kernel, and with it the order of its sums, by the shape of a product: MKL's differ for 1
to 7 rows, and for many rows where the inner size is large; oneDNN's packed products differ at most between
one row and several. So rows are padded to a multiple and multiplied in blocks, and the first way is taken
that is seen to agree for all its numbers of rows. No clock is involved: the choice is the same on every start
of one build on one type of processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cellserve_model.products import LARGE_BYTES, Weight, bind_add, bind_biased, can_pack, packed

__all__ = ["WIDTH_MULTIPLE", "Blocking", "choose_blocking"]

# Two vectors of AVX-512, the longest unit of torch's vectorised loops: no row ends inside one.
WIDTH_MULTIPLE: Final = 32
_BLOCKS: Final = (64, 32, 16)
_PACKED_MULTIPLES: Final = (1, 2)
_PLAIN_MULTIPLE: Final = 8


@dataclass(frozen=True, slots=True)
class Blocking:
    """Rows are padded to `row_multiple` and multiplied in blocks of at most `block_rows`, as `prepare` has it."""

    row_multiple: int
    block_rows: int
    prepare: Callable[[Tensor], Weight]


def choose_blocking(weights: Sequence[Tensor]) -> Blocking:
    """How to multiply rows with `weights`, each (K, N) on the CPU.

    Small weights go unpacked: MKL multiplies eight rows by them before oneDNN has begun.
    """
    by_shape = {tuple(weight.shape): weight for weight in weights}
    if can_pack() and max(weight.nbytes for weight in weights) >= LARGE_BYTES:
        for multiple in _PACKED_MULTIPLES:
            block = _largest_consistent_block([_pack(weight) for weight in by_shape.values()], multiple)
            if block is not None:
                return Blocking(multiple, block, _pack)
    block = _largest_consistent_block([Weight(weight) for weight in by_shape.values()], _PLAIN_MULTIPLE)
    # With blocks of one size there is nothing to differ from.
    return Blocking(_PLAIN_MULTIPLE, _PLAIN_MULTIPLE if block is None else block, Weight)


def _pack(weight: Tensor) -> Weight:
    return packed(weight, 1)


def _largest_consistent_block(weights: Sequence[Weight], multiple: int) -> int | None:
    for block in _BLOCKS:
        if all(_is_consistent(weight, multiple, block) for weight in weights):
            return block
    return None


def _is_consistent(weight: Weight, multiple: int, block: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(block, weight.plain.shape[0], generator=generator)
    start = torch.randn(block, weight.plain.shape[1], generator=generator)
    whole = _products(weight, rows, start)
    # Where in the block a row stands must not matter either.
    turned = _products(weight, rows.flip(0), start.flip(0))
    if not torch.equal(turned[0].flip(0), whole[0]):
        return False
    return all(
        torch.equal(fewer, more[:size])
        for size in range(multiple, block, multiple)
        for fewer, more in zip(_products(weight, rows[:size], start[:size]), whole, strict=True)
    )


def _products(weight: Weight, rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The two forms of product: added to sums, and with a bias, here the zeros."""
    size = weight.plain.shape[1]
    (added,) = bind_add(weight, rows, start.clone(), len(rows), [size])()
    bias = torch.linspace(-1, 1, size)
    return added, bind_biased(weight, bias, rows, torch.empty_like(start), len(rows))()
