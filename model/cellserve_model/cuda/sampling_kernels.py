"""Sampling on the device: the same choice as `sampling.sample`, one program for each row of logits.

The distribution is never normalised or sorted: what top-k and top-p leave out is found by bisection on the
logits' bits, and the choice is the first token whose cumulative weight passes the random number.
Symbols: B rows, V vocabulary, O' padded outputs (their logits are -inf), Q stop tokens.
"""

# fmt: off
import triton
import triton.language as tl

__all__ = ["sample_kernel", "turn_kernel", "uniform"]


@triton.jit
def uniform(seed, position):
    """A float64 in [0, 1) from int64 bits of a seed and a position: Philox4x32-10, word for word as in sampling.py."""
    mask: tl.constexpr = 0xFFFFFFFF
    c0, c1 = position & mask, (position >> 32) & mask
    c2, c3 = position * 0, position * 0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in tl.static_range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & mask, (product1 >> 32) & mask
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & mask, high0 ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    bits = ((c0 >> 5) << 26) | (c1 >> 6)  # 27 and 26 bits
    return bits.to(tl.float64) * (2.0 ** -53)


@triton.jit
def load_part(values, first, top, temperature, num_outputs: tl.constexpr, block: tl.constexpr):
    """A block of a row: the ids, the logits as integers of the same order in [0, 2^32), and their weights."""
    ids = first + tl.arange(0, block)
    logits = tl.load(values + ids, mask=ids < num_outputs, other=float("-inf"))
    weights = tl.exp((logits.to(tl.float64) - top) / temperature)
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # the two zeros are equally likely
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return ids, keys, weights


@triton.jit
def count_and_weight(values, key, top, temperature, num_outputs: tl.constexpr, block: tl.constexpr):
    """How many tokens have at least this key, and their weight."""
    count = tl.full((), 0, tl.int32)
    weight = tl.full((), 0.0, tl.float64)
    for first in range(0, num_outputs, block):
        _ids, keys, weights = load_part(values, first, top, temperature, num_outputs, block)
        inside = keys >= key
        count += tl.sum(inside.to(tl.int32), axis=0)
        weight += tl.sum(tl.where(inside, weights, 0.0), axis=0)
    return count, weight


@triton.jit
def choose(
    values, likeliest, number, temperature, top_k, top_p,
    num_outputs: tl.constexpr, num_tokens: tl.constexpr, block: tl.constexpr,
):
    """Temperature first, then top-k, then top-p over what is left; of equally likely tokens the lower ids stay."""
    top = tl.load(values + likeliest).to(tl.float64)
    least = tl.full((), 0, tl.int64)  # the least key that is kept, and how many of those that have it
    num_least = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    if (top_k > 0) | (top_p < 1.0):
        most = tl.where(top_k > 0, tl.minimum(top_k, num_tokens), num_tokens)
        for bit in range(32):
            higher = least + (tl.full((), 1, tl.int64) << (31 - bit))
            count, weight = count_and_weight(values, higher, top, temperature, num_outputs, block)
            least = tl.where(count >= most, higher, least)
        count, weight = count_and_weight(values, least + 1, top, temperature, num_outputs, block)
        count_least, weight_least = count_and_weight(values, least, top, temperature, num_outputs, block)
        each = (weight_least - weight) / (count_least - count)
        num_least = most - count
        total = weight + each * num_least
        if top_p < 1.0:
            goal = top_p * total
            nucleus = tl.full((), 0, tl.int64)
            for bit in range(32):
                higher = nucleus + (tl.full((), 1, tl.int64) << (31 - bit))
                count, weight = count_and_weight(values, higher, top, temperature, num_outputs, block)
                # At least the likeliest token, even for a top_p of 0.
                nucleus = tl.where((weight >= goal) & (count > 0), higher, nucleus)
            count, weight = count_and_weight(values, nucleus + 1, top, temperature, num_outputs, block)
            count_least, weight_least = count_and_weight(values, nucleus, top, temperature, num_outputs, block)
            each = (weight_least - weight) / (count_least - count)
            needed = tl.maximum(tl.ceil((goal - weight) / each), 1.0).to(tl.int32)
            num_least = tl.minimum(needed, tl.where(nucleus == least, num_least, count_least - count))
            least = nucleus
            total = weight + each * num_least
    else:
        count, total = count_and_weight(values, least + 1, top, temperature, num_outputs, block)
    target = number * total
    chosen = tl.full((), num_outputs, tl.int32)
    last = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    num_equal = tl.full((), 0, tl.int32)
    for first in range(0, num_outputs, block):
        ids, keys, weights = load_part(values, first, top, temperature, num_outputs, block)
        is_least = (keys == least).to(tl.int32)
        rank = num_equal + tl.cumsum(is_least, axis=0)
        weights = tl.where((keys > least) | ((is_least > 0) & (rank <= num_least)), weights, 0.0)
        is_possible = weights > 0
        passes = is_possible & (before + tl.cumsum(weights, axis=0) > target)
        chosen = tl.minimum(chosen, tl.min(tl.where(passes, ids, num_outputs), axis=0))
        last = tl.maximum(last, tl.max(tl.where(is_possible, ids, 0), axis=0))
        before += tl.sum(weights, axis=0)
        num_equal += tl.sum(is_least, axis=0)
    # Rounding can put the target on the very end; the last token that is possible owns it.
    return tl.where(chosen < num_outputs, chosen, last)


@triton.jit(do_not_specialize=["num_stops"])
def sample_kernel(
    logits, likeliest, totals,  # of the head: (B, O') and (B,)
    seeds, positions, temperatures, top_ks, top_ps,  # (B,): int64, int64, float32, int32, float32
    stops, num_stops,  # (B, Q) int32, padded with -1
    tokens,  # (B,) int32: what the step consumes
    done, alive, counts, limits,  # (B,) int32: tokens sampled, whether the row still moves, tokens consumed, at most
    out_tokens, out_logprobs, out_stride,  # (T, B)
    num_outputs: tl.constexpr, num_tokens: tl.constexpr, block: tl.constexpr,
):
    """Sample a token for each row, B programs; at its limit, or with a stop token, it moves for the last time."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * num_outputs
    step = tl.load(done + row)
    temperature = tl.load(temperatures + row).to(tl.float64)
    token = tl.load(likeliest + row)
    if temperature > 0:
        number = uniform(tl.load(seeds + row), tl.load(positions + row) + step)
        token = choose(
            values, token, number, temperature, tl.load(top_ks + row), tl.load(top_ps + row).to(tl.float64),
            num_outputs, num_tokens, block,
        )
    tl.store(tokens + row, token)
    place = step.to(tl.int64) * out_stride + row
    tl.store(out_tokens + place, token)
    tl.store(out_logprobs + place, tl.load(values + token) - tl.load(totals + row))
    tl.store(done + row, step + 1)
    state = tl.load(alive + row)  # 2: moves, 1: moves for the last time, 0: stays
    count = tl.load(counts + row)
    if state == 2:
        if count + 1 >= tl.load(limits + row):
            state = 1
        for number_of_stop in range(num_stops):
            if tl.load(stops + row.to(tl.int64) * num_stops + number_of_stop) == token:
                state = 1
    else:
        state = 0
    tl.store(alive + row, state)
    tl.store(counts + row, count + tl.where(state > 0, 1, 0))


@triton.jit
def turn_kernel(sources, targets, alive, num_rows: tl.constexpr):
    """Let each row that has moved be read where it was written; one that stays is overwritten next time."""
    rows = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    has_moved = tl.load(alive + rows) > 0
    source, target = tl.load(sources + rows), tl.load(targets + rows)
    tl.store(sources + rows, tl.where(has_moved, target, source))
    tl.store(targets + rows, tl.where(has_moved, source, target))
