"""The head: logits of hidden vectors wherever they stand, and what is read off a row of logits.

Symbols: as in cell_tiles.py; M hidden vectors, a multiple of R; O' padded outputs, whose padding is -inf.
"""

# fmt: off
import triton
import triton.language as tl

from cellserve_model.cuda.cell_tiles import add_products
from cellserve_model.cuda.kernels import tile_place

__all__ = ["logits_kernel", "read_off_kernel"]


@triton.jit
def logits_kernel(
    halves, bits, rows, logits,  # where the vectors stand; (M,) int32; the output (M, O') float32
    weight, bias,  # (O', W), (O',)
    width: tl.constexpr, num_outputs: tl.constexpr, is_full: tl.constexpr,
    stride: tl.constexpr, offset: tl.constexpr,  # halves of a row, and before its hidden vector
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """logits = head(h), in (M / R) * (O' / C) programs."""
    numbers, columns = tile_place(tl.program_id(0), num_outputs, tile_rows, tile_columns)
    places = tl.load(rows + numbers).to(tl.int64) * stride + offset
    zeros = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    sums, _sum1, _sum2, _sum3 = add_products(
        zeros, zeros, zeros, zeros, halves, bits, places, weight, columns,
        width, num_outputs, 1, is_full, depth, stages,
    )
    sums += tl.load(bias + columns)[None, :]
    tl.store(logits + numbers.to(tl.int64)[:, None] * num_outputs + columns[None, :], sums)


@triton.jit
def read_off_kernel(
    logits, observed, likeliest, totals, logprobs,  # (M, O'); (M,) int32; the outputs (M,): int32, float32, float32
    num_outputs: tl.constexpr, block: tl.constexpr,
):
    """argmax (of equals the lowest), logsumexp, and the log-probability of the observed, in M programs."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * num_outputs
    best = tl.full((), 0, tl.int32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, num_outputs, block):
        numbers = first + tl.arange(0, block)
        part = tl.load(values + numbers, mask=numbers < num_outputs, other=float("-inf"))
        part_top = tl.max(part, axis=0)
        best = tl.where(part_top > top, first + tl.argmax(part, axis=0), best)
        part_top = tl.maximum(part_top, top)
        total = total * tl.exp(top - part_top) + tl.sum(tl.exp(part - part_top), axis=0)
        top = part_top
    logarithm = top + tl.log(total)
    tl.store(likeliest + row, best)
    tl.store(totals + row, logarithm)
    tl.store(logprobs + row, tl.load(values + tl.load(observed + row)) - logarithm)
