"""The cells' mathematics on one tile of rows and columns: the device functions that the kernels are made of.

A float32 number h is kept as two halves of 16 bits: `high`, h rounded to bfloat16, and `low`, what is left of
its bits; together they are h exactly. So a product with bfloat16 weights reads half the bytes of the state, and
reads them as the tensor cores multiply them. A vector of halves is W highs, then W lows.
Symbols: R rows and C columns of a tile, K inner size of a product, W padded hidden size, G blocks of weights.
Places of rows are (R,) int64 and count halves. Sums are (R, C) float32.
"""

# fmt: off
import triton
import triton.language as tl

__all__ = ["candidate_tile", "gates_tile", "join", "load_number", "one_product_tile", "split", "store_number"]


@triton.jit
def join(high, low):
    """Two int16 halves to the float32 that they are."""
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split(value):
    """A float32 to its int16 halves: (high, low), high rounded to nearest, ties away from zero."""
    bits = value.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)


@triton.jit
def load_number(bits, rows, columns, width: tl.constexpr):
    """Load a tile of float32 from the vectors of halves that begin at `rows`."""
    places = bits + rows[:, None] + columns[None, :]
    return join(tl.load(places), tl.load(places + width))


@triton.jit
def store_number(bits, rows, columns, value, width: tl.constexpr):
    """Store a tile of float32 as halves."""
    places = bits + rows[:, None] + columns[None, :]
    high, low = split(value)
    tl.store(places, high)
    tl.store(places + width, low)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """From the exp of what is never positive, so that nothing overflows; within 2e-7 of tanh."""
    small = tl.exp(-2.0 * tl.abs(x))
    positive = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def mix(keep, old, new):
    """keep * old + (1 - keep) * new: to the bit the old for keep = 1, the new for keep = 0."""
    return keep * old + (1.0 - keep) * new


@triton.jit
def add_products(
    sum0, sum1, sum2, sum3,
    halves, bits, rows,  # the same vectors of halves as bfloat16 and as int16, and where they begin
    weight, columns,  # (num_blocks, W, K)
    inner: tl.constexpr, width: tl.constexpr, num_blocks: tl.constexpr, is_full: tl.constexpr,
    depth: tl.constexpr, stages: tl.constexpr,
):
    """Add to each of the first `num_blocks` sums the rows times its block of weights.

    is_full: the weights are float32, so the rows' low halves are multiplied too.
    """
    for first in tl.range(0, inner, depth, num_stages=stages):
        numbers = first + tl.arange(0, depth)
        places = rows[:, None] + numbers[None, :]
        if is_full:
            given = join(tl.load(bits + places), tl.load(bits + places + inner))  # (R, depth)
        else:
            given = tl.load(halves + places)
        weights = weight + columns[None, :] * inner + numbers[:, None]  # (depth, C), along K in memory
        sum0 = tl.dot(given, tl.load(weights), sum0, input_precision="ieee")
        if num_blocks > 1:
            sum1 = tl.dot(given, tl.load(weights + width * inner), sum1, input_precision="ieee")
        if num_blocks > 2:
            sum2 = tl.dot(given, tl.load(weights + 2 * width * inner), sum2, input_precision="ieee")
        if num_blocks > 3:
            sum3 = tl.dot(given, tl.load(weights + 3 * width * inner), sum3, input_precision="ieee")
    return sum0, sum1, sum2, sum3


@triton.jit
def add_inputs(
    sum0, sum1, sum2, sum3,
    tokens, table,  # (R,), (V, row_blocks * W)
    halves, bits, below, weight, bias, columns,  # as in add_products; bias (num_blocks, W) float32
    inner: tl.constexpr, width: tl.constexpr, row_blocks: tl.constexpr, num_blocks: tl.constexpr,
    is_table: tl.constexpr, is_full: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """Add the input side of the first `num_blocks` blocks, W_x x_t + b: looked up where is_table, else multiplied."""
    if is_table:
        values = table + tokens.to(tl.int64)[:, None] * (row_blocks * width) + columns[None, :]
        sum0 += tl.load(values).to(tl.float32)
        if num_blocks > 1:
            sum1 += tl.load(values + width).to(tl.float32)
        if num_blocks > 2:
            sum2 += tl.load(values + 2 * width).to(tl.float32)
        if num_blocks > 3:
            sum3 += tl.load(values + 3 * width).to(tl.float32)
    else:
        sum0, sum1, sum2, sum3 = add_products(
            sum0, sum1, sum2, sum3, halves, bits, below, weight, columns,
            inner, width, num_blocks, is_full, depth, stages,
        )
        sum0 += tl.load(bias + columns)[None, :]
        if num_blocks > 1:
            sum1 += tl.load(bias + width + columns)[None, :]
        if num_blocks > 2:
            sum2 += tl.load(bias + 2 * width + columns)[None, :]
        if num_blocks > 3:
            sum3 += tl.load(bias + 3 * width + columns)[None, :]
    return sum0, sum1, sum2, sum3


@triton.jit
def one_product_tile(
    halves, bits, old, columns,  # the slab, and where this layer's state begins in each row
    tokens, table, below_halves, below_bits, below, input_weight, bias,  # the input, as in add_inputs
    weight, recurrent_bias, leak,  # (G, W, W), (W,), ()
    cell: tl.constexpr, inner: tl.constexpr, width: tl.constexpr, num_blocks: tl.constexpr,
    is_table: tl.constexpr, is_full: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """One tile of every cell but `gru`. Returns h_t, c_t and three gates; what a cell lacks repeats h_t."""
    zeros = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    sum0, sum1, sum2, sum3 = add_products(
        zeros, zeros, zeros, zeros, halves, bits, old, weight, columns,
        width, width, num_blocks, is_full, depth, stages,
    )
    recurrent = sum2
    if cell == "gru_reset_after":
        # The reset gate multiplies the recurrent side of the candidate alone, so its two sides stay apart.
        recurrent += tl.load(recurrent_bias + columns)[None, :]
        sum2 = zeros
    sum0, sum1, sum2, sum3 = add_inputs(
        sum0, sum1, sum2, sum3, tokens, table, below_halves, below_bits, below, input_weight, bias, columns,
        inner, width, num_blocks, num_blocks, is_table, is_full, input_depth, stages,
    )
    hidden = load_number(bits, old, columns, width)
    if cell == "vanilla_rnn":
        new_hidden = tanh(sum0)
        new_memory, gate0, gate1, gate2 = new_hidden, new_hidden, new_hidden, new_hidden
    elif cell == "leaky_rnn":
        gate0 = tl.load(leak) + zeros
        new_hidden = mix(gate0, hidden, tanh(sum0))
        new_memory, gate1, gate2 = new_hidden, new_hidden, new_hidden
    elif cell == "simplified_gru":
        gate0 = sigmoid(sum0)
        new_hidden = mix(gate0, hidden, tanh(sum1))
        new_memory, gate1, gate2 = new_hidden, new_hidden, new_hidden
    elif cell == "gru_reset_after":
        gate0, gate1 = sigmoid(sum0), sigmoid(sum1)
        new_hidden = mix(gate0, hidden, tanh(sum2 + gate1 * recurrent))
        new_memory, gate2 = new_hidden, new_hidden
    else:
        tl.static_assert(cell == "lstm")
        gate0, gate1, gate2 = sigmoid(sum0), sigmoid(sum1), sigmoid(sum3)
        memory = load_number(bits, old + 2 * width, columns, width)
        new_memory = gate1 * memory + gate0 * tanh(sum2)
        new_hidden = gate2 * tanh(new_memory)
    return new_hidden, new_memory, gate0, gate1, gate2


@triton.jit
def gates_tile(
    halves, bits, old, columns,
    tokens, table, below_halves, below_bits, below, input_weight, bias,
    weight,  # (3, W, W)
    inner: tl.constexpr, width: tl.constexpr, is_table: tl.constexpr, is_full: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """One tile of the first product of `gru`. Returns z, r and r * h_{t-1}."""
    zeros = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    sum0, sum1, sum2, sum3 = add_products(
        zeros, zeros, zeros, zeros, halves, bits, old, weight, columns,
        width, width, 2, is_full, depth, stages,
    )
    sum0, sum1, sum2, sum3 = add_inputs(
        sum0, sum1, sum2, sum3, tokens, table, below_halves, below_bits, below, input_weight, bias, columns,
        inner, width, 3, 2, is_table, is_full, input_depth, stages,
    )
    reset = sigmoid(sum1)
    # The reset gate acts before the product, as in Cho et al. (2014).
    return sigmoid(sum0), reset, reset * load_number(bits, old, columns, width)


@triton.jit
def candidate_tile(
    halves, bits, old, columns, update,  # update: z (R, C)
    reset_halves, reset_bits, reset_rows,  # r * h_{t-1} in halves
    tokens, table, below_halves, below_bits, below, input_weight, bias,
    weight,
    inner: tl.constexpr, width: tl.constexpr, is_table: tl.constexpr, is_full: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    input_depth: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr,
):
    """One tile of the second product of `gru`. Returns h_t."""
    zeros = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    sum0, sum1, sum2, sum3 = add_products(
        zeros, zeros, zeros, zeros, reset_halves, reset_bits, reset_rows, weight + 2 * width * width, columns,
        width, width, 1, is_full, depth, stages,
    )
    sum0, sum1, sum2, sum3 = add_inputs(
        sum0, sum1, sum2, sum3, tokens, table + 2 * width, below_halves, below_bits, below,
        input_weight + 2 * width * inner, bias + 2 * width, columns,
        inner, width, 3, 1, is_table, is_full, input_depth, stages,
    )
    return mix(update, load_number(bits, old, columns, width), tanh(sum0))
