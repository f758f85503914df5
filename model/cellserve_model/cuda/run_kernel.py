"""Many steps of all layers in one launch, for runs of more than one token.

The programs stay on the device and wait for each other where a kernel boundary would be: after every layer, and
for `gru` between its two products. So they must all be resident at once, which the launch asks for. States go
to and fro between a session's two rows of the slab: step t reads the one that step t - 1 wrote.

Rows are sorted, longest run first, and a step covers the tiles of rows of which one still runs; a row that has
ended in such a tile is copied, so that all rows of a tile stand on the same side.
Symbols: as in kernels.py; N tokens of all rows, T steps, L layers, P programs.
"""

# fmt: off
import triton
import triton.language as tl

from cellserve_model.cuda.cell_tiles import (
    candidate_tile,
    gates_tile,
    load_number,
    one_product_tile,
    split,
    store_number,
)
from cellserve_model.cuda.kernels import tile_place

__all__ = ["run_kernel"]


@triton.jit
def wait_for_all(arrivals, num_waits):
    """Wait until every program has come here for the `num_waits`-th time; what they stored is then seen by all."""
    tl.debug_barrier()  # the atomic is one thread's: the others must have stored before it, and load after it
    target = num_waits * tl.num_programs(0)
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < target:
        arrived = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def find_rows(
    tile, step, sources, targets, starts, counts,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    stride: tl.constexpr, offset: tl.constexpr,
):
    """A tile's rows and columns; whether each row still runs, its token's number, and where it is read and written."""
    rows, columns = tile_place(tile, width, tile_rows, tile_columns)
    is_active = step < tl.load(counts + rows)
    number = tl.where(is_active, tl.load(starts + rows) + step, 0).to(tl.int64)
    source, target = tl.load(sources + rows), tl.load(targets + rows)
    is_even = step % 2 == 0
    old = tl.where(is_even, source, target).to(tl.int64) * stride + offset
    new = tl.where(is_even, target, source).to(tl.int64) * stride + offset
    return rows, columns, is_active, number, old, new


@triton.jit
def record(
    values, out, wanted, rows, columns,
    num_vectors: tl.constexpr, vector: tl.constexpr, num_parts: tl.constexpr, part: tl.constexpr, width: tl.constexpr,
):
    """Store a tile of float32 in out (n, num_vectors, num_parts, W), at each row's place in `wanted`, -1 being none."""
    place = tl.load(wanted + rows).to(tl.int64)[:, None]
    vectors = (place * num_vectors + vector) * num_parts + part
    tl.store(out + vectors * width + columns[None, :], values, mask=place >= 0)


@triton.jit
def record_halves(values, out, wanted, rows, columns, width: tl.constexpr):
    """The same as halves (n, 2, W), which is what the head reads."""
    place = tl.load(wanted + rows).to(tl.int64)[:, None]
    high, low = split(values)
    tl.store(out + place * (2 * width) + columns[None, :], high, mask=place >= 0)
    tl.store(out + place * (2 * width) + width + columns[None, :], low, mask=place >= 0)


# Not compiled anew for other numbers: a tick would wait for it.
@triton.jit(do_not_specialize=["num_steps", "num_rows"])
def run_kernel(
    halves, bits, sources, targets,  # the slab; (B,) int32, the two rows of each session
    starts, counts, row_tiles,  # (B,) int32, first token and number of tokens; (T,) int32, tiles of rows of a step
    arrivals,  # () int32, zero
    tokens, table,  # (N,) int32, (V, G*W)
    vector_halves, vector_bits, first_weight,  # (N, 2, I'), the input where is_table is off
    input_weights, biases, recurrent_weights, recurrent_biases, leaks,  # as in weights.py
    update, reset_halves, reset_bits,  # (B, W) float32 and (B, 2, W): what the products of `gru` pass on
    hidden_places, hidden_out,  # (T, B) int32; (M, 2, W) int16, h_t of the top layer
    state_places, states_out,  # (T, B) int32; (., L, vectors, W) float32
    gate_places, gates_out,  # (T, B) int32; (., gates, L, W) float32
    num_steps, num_rows,
    cell: tl.constexpr, num_layers: tl.constexpr, num_vectors: tl.constexpr, num_gates: tl.constexpr,
    inner: tl.constexpr, width: tl.constexpr, num_blocks: tl.constexpr,
    is_table: tl.constexpr, is_full: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """Advance every row by its count of tokens, in P programs, any number that fits on the device at once."""
    layer_halves: tl.constexpr = num_vectors * 2 * width
    stride: tl.constexpr = num_layers * layer_halves
    num_waits = 0
    for step in range(num_steps):
        num_tiles = tl.load(row_tiles + step) * (width // tile_columns)
        for layer in tl.static_range(num_layers):
            if layer == 0:
                below_halves, below_bits, input_weight = vector_halves, vector_bits, first_weight
            else:
                below_halves, below_bits = halves, bits
                input_weight = input_weights + (layer - 1) * num_blocks * width * width
            bias = biases + layer * num_blocks * width
            weight = recurrent_weights + layer * num_blocks * width * width
            gate_asked = gate_places + step * num_rows
            if cell == "gru":
                for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                    rows, columns, is_active, number, old, new = find_rows(
                        tile, step, sources, targets, starts, counts,
                        width, tile_rows, tile_columns, stride, layer * layer_halves,
                    )
                    below = number * (2 * inner) if layer == 0 else new - layer_halves
                    token = number
                    if is_table and layer == 0:  # with vectors there are no tokens to load
                        token = tl.load(tokens + number).to(tl.int64)
                    gate0, gate1, remembered = gates_tile(
                        halves, bits, old, columns,
                        token, table, below_halves, below_bits, below, input_weight, bias, weight,
                        inner if layer == 0 else width, width, is_table and layer == 0, is_full,
                        tile_rows, tile_columns, input_depth if layer == 0 else depth, depth, stages,
                    )
                    places = rows.to(tl.int64)
                    tl.store(update + places[:, None] * width + columns[None, :], gate0)
                    store_number(reset_bits, places * (2 * width), columns, remembered, width)
                    record(gate0, gates_out, gate_asked, rows, columns, num_gates, 0, num_layers, layer, width)
                    record(gate1, gates_out, gate_asked, rows, columns, num_gates, 1, num_layers, layer, width)
                num_waits += 1
                wait_for_all(arrivals, num_waits)
            for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                rows, columns, is_active, number, old, new = find_rows(
                    tile, step, sources, targets, starts, counts,
                    width, tile_rows, tile_columns, stride, layer * layer_halves,
                )
                below = number * (2 * inner) if layer == 0 else new - layer_halves
                token = number
                if is_table and layer == 0:  # with vectors there are no tokens to load
                    token = tl.load(tokens + number).to(tl.int64)
                places = rows.to(tl.int64)
                if cell == "gru":
                    hidden = candidate_tile(
                        halves, bits, old, columns, tl.load(update + places[:, None] * width + columns[None, :]),
                        reset_halves, reset_bits, places * (2 * width),
                        token, table, below_halves, below_bits, below, input_weight, bias, weight,
                        inner if layer == 0 else width, width, is_table and layer == 0, is_full,
                        tile_rows, tile_columns, input_depth if layer == 0 else depth, depth, stages,
                    )
                else:
                    hidden, memory, gate0, gate1, gate2 = one_product_tile(
                        halves, bits, old, columns,
                        token, table, below_halves, below_bits, below, input_weight, bias,
                        weight, recurrent_biases + layer * width, leaks + layer,
                        cell, inner if layer == 0 else width, width, num_blocks, is_table and layer == 0, is_full,
                        tile_rows, tile_columns, input_depth if layer == 0 else depth, depth, stages,
                    )
                    if num_gates > 0:
                        record(gate0, gates_out, gate_asked, rows, columns, num_gates, 0, num_layers, layer, width)
                    if num_gates > 1:
                        record(gate1, gates_out, gate_asked, rows, columns, num_gates, 1, num_layers, layer, width)
                    if num_gates > 2:
                        record(gate2, gates_out, gate_asked, rows, columns, num_gates, 2, num_layers, layer, width)
                hidden = tl.where(is_active[:, None], hidden, load_number(bits, old, columns, width))
                store_number(bits, new, columns, hidden, width)
                asked = state_places + step * num_rows
                record(hidden, states_out, asked, rows, columns, num_layers, layer, num_vectors, 0, width)
                if layer == num_layers - 1:
                    record_halves(hidden, hidden_out, hidden_places + step * num_rows, rows, columns, width)
                if cell == "lstm":
                    memory = tl.where(is_active[:, None], memory, load_number(bits, old + 2 * width, columns, width))
                    store_number(bits, new + 2 * width, columns, memory, width)
                    record(memory, states_out, asked, rows, columns, num_layers, layer, num_vectors, 1, width)
            num_waits += 1
            wait_for_all(arrivals, num_waits)
