"""With `deterministic` on, a session's results are the same to the last bit whatever shares its batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellserve_model import CELLS, Stepper, Want, load_stepper
from cellserve_model.determinism import choose_blocking
from cellserve_model.products import bind_add
from tests.support.models import write_tiny_model

NUM_TOKENS = 12
EVERYTHING = 63
MAX_BATCH = 150

Traced = list[tuple[bytes, ...]]


def _load(directory: Path, num_threads: int = 1) -> Stepper:
    return load_stepper(
        directory,
        name="tiny",
        version=1,
        device="cpu",
        num_slots=200,
        max_batch=MAX_BATCH,
        deterministic=True,
        num_threads=num_threads,
    )


def _tokens(stepper: Stepper, random: np.random.Generator, count: int) -> NDArray[np.uint32] | NDArray[np.float32]:
    if stepper.info.vocab_size is not None:
        return random.integers(0, stepper.info.vocab_size, count).astype(np.uint32)
    assert stepper.info.input_size is not None
    return random.standard_normal((count, stepper.info.input_size)).astype(np.float32)


def _trace(stepper: Stepper, mixes: list[tuple[int, int, int]], seed: int) -> Traced:
    """Run one session's NUM_TOKENS tokens, each tick beside others; (others before, others after, tokens of a tick)."""
    session = _tokens(stepper, np.random.default_rng(0), NUM_TOKENS)
    random = np.random.default_rng(seed)
    stepper.zero_rows(np.arange(1, 201))
    wants = EVERYTHING if stepper.info.vocab_size is not None else EVERYTHING & ~Want.LOGPROB
    traced: Traced = []
    done, tick = 0, 0
    while done < NUM_TOKENS:
        num_before, num_after, length = mixes[tick % len(mixes)]
        length = min(length, NUM_TOKENS - done)
        others = random.permutation(np.arange(2, 200))[: num_before + num_after]
        slots = np.concatenate((others[:num_before], [1], others[num_before:]))
        counts = random.integers(1, 5, len(slots))
        counts[num_before] = length
        tokens = _tokens(stepper, random, int(counts.sum()))
        first = int(counts[:num_before].sum())
        tokens[first : first + length] = session[done : done + length]
        asked = random.integers(0, 64, len(tokens)).astype(np.uint8) & np.uint8(wants)
        asked[first : first + length] = wants
        result = stepper.collect(stepper.submit(slots, counts, tokens, asked, 3))

        columns = [
            _own(values, asked, bit, first, length)
            for values, bit in (
                (result.next_tokens, Want.NEXT_TOKEN),
                (result.top_tokens, Want.TOP_K),
                (result.top_logprobs, Want.TOP_K),
                (result.logprobs, Want.LOGPROB),
                (result.logits, Want.LOGITS),
                (result.states, Want.STATE),
                (result.gates, Want.GATES),
            )
            if wants & bit
        ]
        traced += list(zip(*columns, strict=True))
        done += length
        tick += 1
    return traced


def _own(values: NDArray[Any], asked: NDArray[np.uint8], bit: int, first: int, length: int) -> list[bytes]:
    """The bytes of an output for `length` tokens from number `first` on, all of which asked for it."""
    start = int(np.count_nonzero(asked[:first] & bit))
    return [values[start + number].tobytes() for number in range(length)]


mixes = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(1, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(9, 2), (40, 1), (96, 1)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_session_is_the_same_to_the_last_bit_whatever_shares_its_batch(
    tmp_path: Path, cell: str, hidden_size: int, num_layers: int, kind: str
) -> None:
    is_tokens = kind == "tokens"
    directory = write_tiny_model(
        tmp_path,
        cell,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=37 if is_tokens else None,
        input_size=None if is_tokens else 5,
        output_size=37,
    )
    with _restored_threads():
        steppers = {num_threads: _load(directory, num_threads) for num_threads in (1, 2)}
        alone = _trace(steppers[1], [(0, 0, 1)], seed=0)

        @settings(max_examples=6, deadline=None)
        @given(mixes, st.integers(0, 1000), st.sampled_from([1, 2]))
        def check(mix: list[tuple[int, int, int]], seed: int, num_threads: int) -> None:
            assert _trace(steppers[num_threads], mix, seed) == alone

        check()


@pytest.mark.parametrize("hidden_size", [128, 512])
def test_every_batch_size_gives_the_bits_of_a_session_alone(tmp_path: Path, hidden_size: int) -> None:
    directory = write_tiny_model(tmp_path, "gru", hidden_size=hidden_size, vocab_size=256, output_size=256)
    with _restored_threads():
        stepper = _load(directory)
        alone = _trace(stepper, [(0, 0, 1)], seed=0)
        for others in (1, 6, 7, 8, 15, 62, 63, 64, 127, 140):
            assert _trace(stepper, [(others // 2, others - others // 2, 12)], seed=others) == alone


def test_generated_tokens_are_the_same_to_the_last_bit_however_a_generation_is_cut(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path, "gru", hidden_size=20, vocab_size=37, output_size=37)

    def generate(stepper: Stepper, slots: list[int], lengths: list[int]) -> list[bytes]:
        stepper.zero_rows(np.arange(1, 201))
        parts, position, size = [], 0, len(slots)
        for length in lengths:
            result = stepper.collect(
                stepper.submit_generate(
                    np.array(slots),
                    np.full(size, length),
                    np.full(size, position),
                    np.arange(size).astype(np.uint64)[::-1].copy(),
                    np.linspace(0.5, 1.5, size, dtype=np.float32)[::-1].copy(),
                    np.full(size, 20),
                    np.full(size, 0.9, dtype=np.float32),
                    np.full((size, 1), -1),
                )
            )
            parts.append(np.concatenate((result.tokens[-1].view(np.float32), result.logprobs[-1])).reshape(2, -1))
            position += length
        return [np.concatenate(parts, axis=1).tobytes(), stepper.read_rows(np.array(slots[-1:])).tobytes()]

    with _restored_threads():
        stepper = _load(directory)
        # The last row always has seed 0 and temperature 0.5 (of one row: linspace's first).
        alone = generate(stepper, [5], [16])
        assert generate(stepper, [9, 5], [1, 15]) == alone
        assert generate(stepper, [*range(10, 77), 5], [3, 4, 9]) == alone


def test_deterministic_steppers_take_one_thread(tmp_path: Path) -> None:
    with _restored_threads():
        torch.set_num_threads(2)
        _load(write_tiny_model(tmp_path, "gru", vocab_size=4))
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "shapes", [((32, 96), (32, 32)), ((512, 1024), (512, 512), (512, 40)), ((1024, 2048), (1024, 96))]
)
def test_a_row_of_a_product_is_the_same_in_every_block_that_was_chosen(shapes: tuple[tuple[int, int], ...]) -> None:
    random = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    blocking = choose_blocking(weights)
    assert blocking.block_rows % blocking.row_multiple == 0
    for matrix in weights:
        weight = blocking.prepare(matrix)
        rows = torch.randn(blocking.block_rows, matrix.shape[0], generator=random)
        sums = torch.randn(blocking.block_rows, matrix.shape[1], generator=random)
        (whole,) = bind_add(weight, rows, sums.clone(), len(rows), [matrix.shape[1]])()
        torch.testing.assert_close(whole, (sums.double() + rows.double() @ matrix.double()).float(), atol=1e-3, rtol=0)
        for size in range(blocking.row_multiple, len(rows) + 1, blocking.row_multiple):
            for first in {0, len(rows) - size}:
                part = slice(first, first + size)
                (found,) = bind_add(weight, rows[part], sums[part].clone(), size, [matrix.shape[1]])()
                assert torch.equal(found, whole[part])


@contextmanager
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
