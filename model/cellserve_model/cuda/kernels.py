"""One step of one layer: `one_product_kernel` for every cell but `gru`, two kernels for that.

A program computes one tile of new states from whole rows of old ones, while other programs still read those
rows. So nothing is stored in place: a step reads one row of the slab and writes another, for each session, and
the slab counts the old row as spare afterwards. `gru` takes two kernels because its second product reads
r * h_{t-1} of whole rows.

Nothing is masked: widths are padded with zeros to whole tiles, which every cell keeps zero, and row numbers are
padded with row 0, which belongs to no session.
Symbols: as in cell_tiles.py; B rows of the batch, a multiple of R.
"""

# fmt: off
import triton
import triton.language as tl

from cellserve_model.cuda.cell_tiles import candidate_tile, gates_tile, one_product_tile, store_number

__all__ = ["candidate_kernel", "gates_kernel", "one_product_kernel", "tile_place"]


@triton.jit
def tile_place(tile, width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr):
    """The rows (R,) and columns (C,) of a tile; columns count fastest, so that neighbours share rows in the cache."""
    rows = (tile // (width // tile_columns)) * tile_rows + tl.arange(0, tile_rows)
    columns = (tile % (width // tile_columns)) * tile_columns + tl.arange(0, tile_columns)
    return rows, columns


@triton.jit
def one_product_kernel(
    halves, bits, sources, targets,  # the slab as bfloat16 and as int16; (B,) int32, its rows to read and to write
    tokens, table,  # (B,) int32, (V, G*W)
    below_halves, below_bits, below_rows,  # what the layer is given where is_table is off; (B,) int32
    input_weight, bias, weight, recurrent_bias, leak,
    cell: tl.constexpr, inner: tl.constexpr, width: tl.constexpr, num_blocks: tl.constexpr,
    is_table: tl.constexpr, is_full: tl.constexpr,
    state_stride: tl.constexpr, state_offset,  # halves of a row, and before this layer's
    below_stride: tl.constexpr, below_offset,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """Advance a layer of any cell but `gru`, in (B / R) * (W / C) programs."""
    rows, columns = tile_place(tl.program_id(0), width, tile_rows, tile_columns)
    old = tl.load(sources + rows).to(tl.int64) * state_stride + state_offset
    new = tl.load(targets + rows).to(tl.int64) * state_stride + state_offset
    below = tl.load(below_rows + rows).to(tl.int64) * below_stride + below_offset
    hidden, memory, _gate0, _gate1, _gate2 = one_product_tile(
        halves, bits, old, columns,
        tl.load(tokens + rows), table, below_halves, below_bits, below, input_weight, bias,
        weight, recurrent_bias, leak, cell, inner, width, num_blocks, is_table, is_full,
        tile_rows, tile_columns, input_depth, depth, stages,
    )
    store_number(bits, new, columns, hidden, width)
    if cell == "lstm":
        store_number(bits, new + 2 * width, columns, memory, width)


@triton.jit
def gates_kernel(
    halves, bits, sources, update, reset_bits,  # update, reset_bits: the outputs, (B, W) float32, (B, 2W) halves
    tokens, table, below_halves, below_bits, below_rows, input_weight, bias, weight,
    inner: tl.constexpr, width: tl.constexpr, is_table: tl.constexpr, is_full: tl.constexpr,
    state_stride: tl.constexpr, state_offset, below_stride: tl.constexpr, below_offset,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """The first half of `gru`: z and r * h_{t-1}."""
    rows, columns = tile_place(tl.program_id(0), width, tile_rows, tile_columns)
    old = tl.load(sources + rows).to(tl.int64) * state_stride + state_offset
    below = tl.load(below_rows + rows).to(tl.int64) * below_stride + below_offset
    gate, _reset, remembered = gates_tile(
        halves, bits, old, columns,
        tl.load(tokens + rows), table, below_halves, below_bits, below, input_weight, bias, weight,
        inner, width, is_table, is_full, tile_rows, tile_columns, input_depth, depth, stages,
    )
    places = rows.to(tl.int64)
    tl.store(update + places[:, None] * width + columns[None, :], gate)
    store_number(reset_bits, places * (2 * width), columns, remembered, width)


@triton.jit
def candidate_kernel(
    halves, bits, sources, targets, update, reset_halves, reset_bits,
    tokens, table, below_halves, below_bits, below_rows, input_weight, bias, weight,
    inner: tl.constexpr, width: tl.constexpr, is_table: tl.constexpr, is_full: tl.constexpr,
    state_stride: tl.constexpr, state_offset, below_stride: tl.constexpr, below_offset,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """The second half of `gru`: the candidate, and h_t."""
    rows, columns = tile_place(tl.program_id(0), width, tile_rows, tile_columns)
    old = tl.load(sources + rows).to(tl.int64) * state_stride + state_offset
    new = tl.load(targets + rows).to(tl.int64) * state_stride + state_offset
    below = tl.load(below_rows + rows).to(tl.int64) * below_stride + below_offset
    places = rows.to(tl.int64)
    hidden = candidate_tile(
        halves, bits, old, columns, tl.load(update + places[:, None] * width + columns[None, :]),
        reset_halves, reset_bits, places * (2 * width),
        tl.load(tokens + rows), table, below_halves, below_bits, below, input_weight, bias, weight,
        inner, width, is_table, is_full, tile_rows, tile_columns, input_depth, depth, stages,
    )
    store_number(bits, new, columns, hidden, width)
