"""Chooses block sizes from the shape of a step: a written rule, no clock.

The rule compares candidates by the time of their waves of programs: the slower of the tensor cores and of the
cache that feeds them, as a whole Hopper chip has them. Being a rule, it gives one shape the same tile on every
start. Symbols: B rows, W padded hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DETERMINISTIC_ROWS", "MIN_ROWS", "Tile", "choose_tile", "padded_width", "tile_depth"]

MIN_ROWS = 16  # fewer would leave the tensor cores' smallest operand half empty
DETERMINISTIC_ROWS = 64  # rows of the only tile that deterministic steps have
_MAX_ROWS = 128
_COLUMNS = (16, 32, 64, 128)
_MAX_SUMS = 128 * 256  # float32 of a program's sums: half the registers of a multiprocessor
_MAX_SUMS_FLOAT32 = 64 * 64  # operands are in registers too, where no tensor core reads them from shared memory
_SHARED_BYTES = 200 * 1024  # of the 227 KiB that a program may have on Hopper
_MAX_STAGES = 4
# One multiprocessor, for each number of the inner size: multiply-adds, and halves from the second-level cache.
# 600 TFLOP/s of bfloat16, as compiled kernels reach, and 5.5 TB/s on 132 of them; a lone one reads at most 64
# bytes a clock.
_PRODUCTS_PER_NANOSECOND = 2300.0
_HALVES_PER_NANOSECOND_ALL = 2750.0
_HALVES_PER_NANOSECOND_ONE = 55.0


@dataclass(frozen=True, slots=True)
class Tile:
    """rows x columns of a program, and the warps and stages of the pipeline that loads for it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def padded_width(size: int) -> int:
    """The width that `size` numbers take: whole tiles, and whole lines of the cache where the padding is small."""
    multiple = 64 if size > 64 else 16
    return -(-size // multiple) * multiple


def tile_depth(width: int) -> int:
    """How many numbers of the inner size a program multiplies at once: the largest power of two that divides."""
    return math.gcd(width, 64)


def choose_tile(
    num_rows: int, width: int, num_blocks: int, num_sums: int, *, is_full: bool, num_multiprocessors: int
) -> Tile:
    """The tile for B rows, a multiple of MIN_ROWS, of a product with `num_blocks` blocks of W columns.

    num_sums: how many sums a program keeps for each of its numbers. is_full: whether the weights are float32.
    """
    max_sums = _MAX_SUMS_FLOAT32 if is_full else _MAX_SUMS
    candidates = [
        (rows, columns)
        for rows in (16, 32, 64, _MAX_ROWS)
        for columns in _COLUMNS
        if num_rows % rows == 0 and width % columns == 0 and rows * columns * num_sums <= max_sums
    ]

    def cost(candidate: tuple[int, int]) -> tuple[float, int]:
        rows, columns = candidate
        programs = (num_rows // rows) * (width // columns)
        active = min(programs, num_multiprocessors)
        feed = min(_HALVES_PER_NANOSECOND_ONE, _HALVES_PER_NANOSECOND_ALL / active)
        wave = max(rows * columns * num_blocks / _PRODUCTS_PER_NANOSECOND, (rows + columns * num_blocks) / feed)
        return -(-programs // num_multiprocessors) * wave, -rows * columns

    rows, columns = min(candidates, key=cost)
    num_warps = 8 if rows * columns * num_sums >= 128 * 128 else 4
    stage_bytes = (4 if is_full else 2) * tile_depth(width) * (rows + columns * num_blocks)
    num_stages = max(2, min(_MAX_STAGES, _SHARED_BYTES // stage_bytes))
    return Tile(rows, columns, num_warps, num_stages)
