"""The GPU's kernels against the transcription in float64, and a GPU's stepper against a CPU's.

On a machine with a GPU they are compiled and run there, elsewhere through Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.interpreter import DEVICE, IS_INTERPRETED, concurrent_programs  # isort: skip: before any kernel

from cellserve_model import CELLS, Stepper, StepResult, Want, load_stepper
from cellserve_model.cuda.slab import join_halves, split_halves
from cellserve_model.cuda.tiles import choose_tile, padded_width, tile_depth
from tests.model.cuda_models import make_cuda_stepper, round_weights
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

if not IS_INTERPRETED:
    pytestmark = pytest.mark.gpu

VOCAB = 7
TOLERANCE = 1e-5
EVERY_SLOT = np.arange(1, 33)


def _write(directory: Path, cell: str, kind: str, hidden_size: int, num_layers: int = 2) -> Path:
    return write_tiny_model(
        directory,
        cell,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=VOCAB if kind == "tokens" else None,
        input_size=3 if kind == "vectors" else None,
        output_size=VOCAB,
    )


def _inputs(random: np.random.Generator, kind: str, count: int) -> NDArray[Any]:
    if kind == "tokens":
        return random.integers(0, VOCAB, count).astype(np.uint32)
    return random.standard_normal((count, 3)).astype(np.float32)


def _step(
    stepper: Stepper, slots: NDArray[np.int64], counts: NDArray[np.int64], inputs: NDArray[Any], wants: Any
) -> StepResult:
    wants = np.broadcast_to(np.asarray(wants, dtype=np.uint8), len(inputs)).copy()
    return stepper.collect(stepper.submit(slots, counts, inputs, wants, 3))


def test_halves_are_the_number_to_the_bit_and_the_high_one_is_its_nearest_bfloat16() -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy((random.standard_normal(10_000) * 10.0 ** random.integers(-30, 30, 10_000)).astype("f"))
    values[:4] = torch.tensor([0.0, -0.0, 1.00390625, -1.00390625])  # the last two lie between two bfloat16
    halves = split_halves(values)
    assert torch.equal(join_halves(halves).view(torch.int32), values.view(torch.int32))
    high = halves[0].view(torch.bfloat16).double()
    nearest = values.bfloat16().double()  # ties to even; ours go away from zero
    assert torch.equal((high - values).abs(), (nearest - values).abs())


@pytest.mark.parametrize("hidden_size", [9, 40])
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_the_transcription_and_touch_no_other_slot(
    tmp_path: Path, cell: str, kind: str, hidden_size: int
) -> None:
    directory = _write(tmp_path, cell, kind, hidden_size)
    stepper, oracle, random = make_cuda_stepper(directory), Oracle(directory), np.random.default_rng(0)
    states = random.uniform(-1, 1, (32, 2, stepper.info.state_size)).astype(np.float32)
    stepper.write_rows(EVERY_SLOT, states)
    for size in (1, 17, 16, 3):
        slots, inputs = random.permutation(EVERY_SLOT)[:size], _inputs(random, kind, size)
        want = Want.LOGITS | Want.STATE | Want.NEXT_TOKEN | (Want.LOGPROB if kind == "tokens" else 0)
        result = _step(stepper, slots, np.ones(size, np.int64), inputs, want)
        assert result.num_padding_rows == (16 if size <= 16 else 32) - size
        expected = states.copy()
        for row, slot in enumerate(slots):
            trace = oracle.run(inputs[row : row + 1], states[slot - 1].astype(np.float64))
            expected[slot - 1] = trace.states[-1]
            np.testing.assert_allclose(result.logits[row], trace.logits[-1], atol=TOLERANCE)
            assert result.next_tokens[row] == trace.logits[-1].argmax()
            if kind == "tokens":
                np.testing.assert_allclose(result.logprobs[row], trace.logprobs(inputs[row : row + 1])[0], atol=1e-5)
        found = stepper.read_rows(EVERY_SLOT)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        assert result.states.tobytes() == found[slots - 1].tobytes()
        others = np.setdiff1d(EVERY_SLOT, slots) - 1
        assert found[others].tobytes() == states[others].tobytes()
        states = found


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_weights_multiply_rounded_states_and_sum_in_float32(tmp_path: Path, cell: str) -> None:
    directory = _write(tmp_path, cell, "vectors", 40, num_layers=1)
    round_weights(directory)
    stepper, random = make_cuda_stepper(directory, weight_dtype=torch.bfloat16), np.random.default_rng(0)
    oracle, size = Oracle(directory), 5
    slots, inputs = EVERY_SLOT[:size], _inputs(random, "vectors", size)
    states = random.uniform(-1, 1, (size, 1, stepper.info.state_size)).astype(np.float32)
    # Numbers that bfloat16 holds exactly are not rounded, so that float64 is to be met as with float32 weights...
    exact_states, exact_inputs = (torch.from_numpy(part).bfloat16().float().numpy() for part in (states, inputs))
    if cell != "gru":  # whose second product reads r * h, rounded
        stepper.write_rows(slots, exact_states)
        found = _step(stepper, slots, np.ones(size, np.int64), exact_inputs, Want.STATE).states
        for row in range(size):
            trace = oracle.run(exact_inputs[row : row + 1], exact_states[row].astype(np.float64))
            np.testing.assert_allclose(found[row], trace.states[-1], atol=TOLERANCE)
    # ...and others by no more than the rounding of what is multiplied, 2^-9 of each, explains.
    stepper.write_rows(slots, states)
    found = _step(stepper, slots, np.ones(size, np.int64), inputs, Want.STATE).states
    for row in range(size):
        trace = oracle.run(inputs[row : row + 1], states[row].astype(np.float64))
        error = np.abs(found[row] - trace.states[-1]).max()
        assert 0 < error < 2**-7
    assert _step(stepper, slots, np.ones(size, np.int64), inputs, Want.STATE).states.dtype == np.float32


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_runs_with_mixed_wants_equal_those_of_a_cpu(tmp_path: Path, cell: str, kind: str) -> None:
    directory = _write(tmp_path, cell, kind, 20)
    ours = make_cuda_stepper(directory)
    theirs = load_stepper(directory, name="tiny", version=1, device="cpu", num_slots=32, max_batch=20)
    random = np.random.default_rng(1)
    for size in (5, 20):
        slots, counts = random.permutation(EVERY_SLOT)[:size], random.integers(1, 5, size)
        inputs = _inputs(random, kind, int(counts.sum()))
        wants = random.integers(0, 64, len(inputs)) & (63 if kind == "tokens" else ~Want.LOGPROB)
        found, expected = (_step(stepper, slots, counts, inputs, wants) for stepper in (ours, theirs))
        for name in ("next_tokens", "top_tokens"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        for name in ("top_logprobs", "logprobs", "logits", "states", "gates"):
            left, right = getattr(found, name), getattr(expected, name)
            assert left.shape == right.shape
            np.testing.assert_allclose(left, right, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(ours.read_rows(EVERY_SLOT), theirs.read_rows(EVERY_SLOT), atol=2e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_run_is_to_the_bit_the_same_steps_one_by_one(tmp_path: Path, cell: str) -> None:
    directory = _write(tmp_path, cell, "tokens", 20)
    at_once, one_by_one = (make_cuda_stepper(directory, deterministic=True) for _ in range(2))
    random = np.random.default_rng(2)
    slots, counts = EVERY_SLOT[:4], np.array([5, 1, 3, 3])
    inputs = _inputs(random, "tokens", 12)
    whole = _step(at_once, slots, counts, inputs, Want.LOGITS | Want.STATE | Want.LOGPROB)
    starts = np.cumsum(counts) - counts
    for step in range(5):
        rows = np.flatnonzero(counts > step)
        places = starts[rows] + step
        part = _step(
            one_by_one,
            slots[rows],
            np.ones(len(rows), np.int64),
            inputs[places],
            Want.LOGITS | Want.STATE | Want.LOGPROB,
        )
        for name in ("logits", "states", "logprobs"):
            assert getattr(part, name).tobytes() == getattr(whole, name)[places].tobytes(), name
    assert at_once.read_rows(EVERY_SLOT).tobytes() == one_by_one.read_rows(EVERY_SLOT).tobytes()


def test_a_deterministic_session_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    directory = _write(tmp_path, "gru", "tokens", 20)
    stepper, random = (
        make_cuda_stepper(directory, deterministic=True, max_batch=70, num_slots=80),
        np.random.default_rng(3),
    )
    session = _inputs(random, "tokens", 3)
    traces = []
    for others in (0, 3, 69):
        stepper.zero_rows(np.arange(1, 81))
        trace = []
        for token in session:
            slots = np.append(np.arange(2, 2 + others), 1)
            inputs = np.append(_inputs(random, "tokens", others), token).astype(np.uint32)
            result = _step(stepper, slots, np.ones(len(slots), np.int64), inputs, Want.STATE | Want.LOGITS)
            trace.append(result.states[-1].tobytes() + result.logits[-1].tobytes())
        traces.append(trace)
    assert traces[0] == traces[1] == traces[2]


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU every launch has many programs already")
@pytest.mark.parametrize("cell", ["gru", "simplified_gru"])
def test_programs_that_run_at_once_wait_for_each_other(tmp_path: Path, cell: str) -> None:
    directory = _write(tmp_path, cell, "tokens", 40)
    alone, together = (make_cuda_stepper(directory) for _ in range(2))
    together._network.max_run_programs = 3
    random = np.random.default_rng(4)
    counts = random.integers(1, 5, 20)
    inputs = _inputs(random, "tokens", int(counts.sum()))
    expected = _step(alone, EVERY_SLOT[:20], counts, inputs, Want.LOGITS)
    with concurrent_programs():
        found = _step(together, EVERY_SLOT[:20], counts, inputs, Want.LOGITS)
    assert found.logits.tobytes() == expected.logits.tobytes()
    assert together.read_rows(EVERY_SLOT).tobytes() == alone.read_rows(EVERY_SLOT).tobytes()


def test_rows_move_and_copies_writes_and_zeros_follow_them(tmp_path: Path) -> None:
    stepper = make_cuda_stepper(_write(tmp_path, "lstm", "tokens", 9))
    random = np.random.default_rng(5)
    for _ in range(3):
        _step(stepper, random.permutation(EVERY_SLOT)[:16], np.ones(16, np.int64), _inputs(random, "tokens", 16), 0)
    states = random.uniform(-1, 1, (3, 2, 18)).astype(np.float32)
    stepper.write_rows(np.array([5, 6, 7]), states)
    stepper.copy_rows(np.array([5, 6]), np.array([6, 5]))
    stepper.zero_rows(np.array([7]))
    assert stepper.read_rows(np.array([6, 5])).tobytes() == states[:2].tobytes()
    assert not stepper.read_rows(np.array([7])).any()


@pytest.mark.parametrize("size", [1, 16, 64, 1024, 16384])
@pytest.mark.parametrize("hidden_size", [9, 100, 256, 512, 1000, 1024, 2048])
def test_every_tile_divides_its_shape_and_fits_the_chip(size: int, hidden_size: int) -> None:
    width, rows = padded_width(hidden_size), max(16, size)
    assert 0 <= width - hidden_size < 64
    for num_blocks, num_sums in ((1, 1), (2, 2), (3, 4), (4, 4)):
        for is_full in (False, True):
            tile = choose_tile(rows, width, num_blocks, num_sums, is_full=is_full, num_multiprocessors=132)
            assert rows % tile.rows == 0
            assert width % tile.columns == 0
            operands = (tile.rows + num_blocks * tile.columns) * tile_depth(width) * (4 if is_full else 2)
            assert tile.num_stages * operands <= 227 * 1024


def test_the_tests_run_where_they_say() -> None:
    assert torch.cuda.is_available() == (DEVICE.type == "cuda")
