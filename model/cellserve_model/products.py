"""Multiplies rows by a weight, with the library that is the fastest for the shape of the product.

On a CPU there are two, compared in bench/NOTES.md: MKL, by torch's addmm, for small weights, and oneDNN, with
the weight packed once at load, from two rows on where a weight is too large for a core's own cache: MKL packs
it anew for every product. (A single row has a way of its own, in lone.py.) A product is bound once to the
buffers that it works on and then called at every step.
Symbols: B rows, B' rows of a product with its padding, K and N sizes of a weight.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "LARGE_BYTES",
    "Weight",
    "bind_add",
    "bind_biased",
    "bind_fill",
    "can_bfloat16",
    "can_pack",
    "fastest",
    "packed",
    "rounded",
]

# About a core's second-level cache; packing pays from here on.
LARGE_BYTES: Final = 2**20
# oneDNN packs for this many rows; other numbers read the same layout, and 64 suits them all.
_PACKED_FOR_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight (K, N) as the libraries read it.

    packed: oneDNN's form of it, None where it is not used. packed_from: the fewest rows to use it for.
    is_bfloat16: whether that form is rounded to bfloat16, as rows and result of the product then are too.
    """

    plain: Tensor
    packed: Tensor | None = None
    packed_from: int = 0
    is_bfloat16: bool = False


def can_pack() -> bool:
    """Whether oneDNN's packed products are in this build of torch, on a processor they were measured on."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine().lower() in {"x86_64", "amd64"}
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed(weight: Tensor, packed_from: int) -> Weight:
    """A weight (K, N) on the CPU, packed for products of at least `packed_from` rows; needs can_pack()."""
    form = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), _PACKED_FOR_ROWS)
    return Weight(weight, form, packed_from)


def can_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in its own instructions; others would be slower than with float32."""
    return can_pack() and torch.cpu._is_avx512_bf16_supported()


def rounded(weight: Tensor) -> Weight:
    """A weight (K, N) on the CPU, rounded to bfloat16; needs can_bfloat16()."""
    form = torch.ops.mkldnn._reorder_linear_weight(weight.t().bfloat16().contiguous(), _PACKED_FOR_ROWS)
    return Weight(weight, form, 1, is_bfloat16=True)


def fastest(weight: Tensor) -> Weight:
    """A weight (K, N) for the fastest product at any number of rows."""
    if weight.nbytes >= LARGE_BYTES and can_pack():
        return packed(weight, 2)
    return Weight(weight)


def bind_add(
    weight: Weight, rows: Tensor, sums: Tensor, num_rows: int, sizes: list[int]
) -> Callable[[], Sequence[Tensor]]:
    """A function that computes `sums` + `rows` W and returns it in parts of `sizes` columns, each of B rows.

    rows: (B', K). sums: (B', N), which may be overwritten by the result or not. num_rows: B.
    """
    own_parts = torch.split(sums[:num_rows], sizes, dim=1)
    matrix, form = weight.plain, weight.packed
    if form is not None and len(rows) >= weight.packed_from:
        linear = torch.ops.mkldnn._linear_pointwise
        is_whole, is_padded = len(sizes) == 1, len(rows) > num_rows

        def add_packed() -> Sequence[Tensor]:
            result: Tensor
            if weight.is_bfloat16:
                result = linear(rows.bfloat16(), form, None, "none", [], "").float().add_(sums)
            else:
                result = linear.binary(rows, sums, form, None, "add")
            if is_padded:
                result = result[:num_rows]
            return (result,) if is_whole else torch.split(result, sizes, dim=1)

        return add_packed

    def add() -> Sequence[Tensor]:
        sums.addmm_(rows, matrix)
        return own_parts

    return add


def bind_biased(weight: Weight, bias: Tensor, rows: Tensor, out: Tensor, num_rows: int) -> Callable[[], Tensor]:
    """A function that computes `bias` + `rows` W and returns its B rows.

    bias: (N,). rows: (B', K). out: (B', N), which may be overwritten by the result or not. num_rows: B.
    """
    own = out[:num_rows]
    matrix, form = weight.plain, weight.packed
    if form is not None and len(rows) >= weight.packed_from:
        linear = torch.ops.mkldnn._linear_pointwise
        is_padded = len(rows) > num_rows

        def multiply_packed() -> Tensor:
            result: Tensor
            if weight.is_bfloat16:
                result = linear(rows.bfloat16(), form, None, "none", [], "").float().add_(bias)
            else:
                result = linear(rows, form, bias, "none", [], "")
            return result[:num_rows] if is_padded else result

        return multiply_packed

    def multiply() -> Tensor:
        torch.addmm(bias, rows, matrix, out=out)
        return own

    return multiply


def bind_fill(weight: Weight, bias: Tensor, rows: Tensor, out: Tensor, num_rows: int) -> Callable[[], None]:
    """As bind_biased, with the result in the B first rows of `out`."""
    own, multiply = out[:num_rows], bind_biased(weight, bias, rows, out, num_rows)

    def fill() -> None:
        result = multiply()
        if not result.is_set_to(own):
            own.copy_(result)

    return fill
