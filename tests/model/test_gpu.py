"""The CUDA path against the transcription and against the CPU; runs where there is a GPU (`make test-gpu`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cellserve_model import CELLS, Stepper, StepResult, Want, load_stepper
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

VOCAB = 13
TOLERANCE = 1e-5


def _load(directory: Path, *, device: str = "cuda", deterministic: bool = False, warm: bool = True) -> Stepper:
    stepper = load_stepper(
        directory,
        name="tiny",
        version=1,
        device=device,
        num_slots=64,
        max_batch=24,
        deterministic=deterministic,
        num_threads=1,
        weights="float32",
    )
    if warm:
        stepper.warm_up()
    return stepper


def _write(directory: Path, cell: str, kind: str) -> Path:
    return write_tiny_model(
        directory,
        cell,
        num_layers=2,
        hidden_size=9,
        vocab_size=VOCAB if kind == "tokens" else None,
        input_size=3 if kind == "vectors" else None,
        output_size=VOCAB,
    )


def _step(
    stepper: Stepper, slots: NDArray[np.int64], counts: NDArray[np.int64], tokens: NDArray[Any], want: int
) -> StepResult:
    wants = np.full(len(tokens), want, dtype=np.uint8)
    return stepper.collect(stepper.submit(slots, counts, tokens, wants, 3))


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("cell", CELLS)
def test_captured_ticks_equal_the_transcription_at_every_batch_size(tmp_path: Path, cell: str, kind: str) -> None:
    directory = _write(tmp_path, cell, kind)
    stepper, oracle, random = _load(directory), Oracle(directory), np.random.default_rng(0)
    assert stepper.info.device == "cuda:0"
    history: dict[int, list[object]] = {slot: [] for slot in range(1, 25)}
    for size in (1, 2, 3, 5, 8, 17, 24, 1):
        slots = random.permutation(np.arange(1, 25))[:size]
        tokens = (
            random.integers(0, VOCAB, size).astype(np.uint32)
            if kind == "tokens"
            else random.standard_normal((size, 3)).astype(np.float32)
        )
        want = Want.LOGITS | Want.STATE | (Want.LOGPROB if kind == "tokens" else 0)
        result = _step(stepper, slots, np.ones(size, np.int64), tokens, want)
        for row, slot in enumerate(slots.tolist()):
            history[slot].append(tokens[row])
            trace = oracle.run(history[slot])
            np.testing.assert_allclose(result.states[row], trace.states[-1], atol=TOLERANCE)
            np.testing.assert_allclose(result.logits[row], trace.logits[-1], atol=TOLERANCE)
            if kind == "tokens":
                expected = trace.logprobs(np.array(history[slot]))[-1]
                np.testing.assert_allclose(result.logprobs[row], expected, atol=TOLERANCE)
    for slot, tokens_so_far in history.items():
        expected_state = (
            oracle.run(tokens_so_far).states[-1] if tokens_so_far else np.zeros((2, stepper.info.state_size))
        )
        np.testing.assert_allclose(stepper.read_rows(np.array([slot]))[0], expected_state, atol=TOLERANCE)
    assert not stepper.read_rows(np.arange(25, 65)).any()


@pytest.mark.parametrize("warm", [False, True])
def test_ragged_ticks_equal_those_of_the_cpu(tmp_path: Path, warm: bool) -> None:
    directory = _write(tmp_path, "gru", "tokens")
    gpu, cpu, random = _load(directory, warm=warm), _load(directory, device="cpu"), np.random.default_rng(0)
    for _ in range(5):
        slots = random.permutation(np.arange(1, 40))[:9]
        counts = random.integers(1, 6, 9)
        tokens = random.integers(0, VOCAB, int(counts.sum())).astype(np.uint32)
        ours, theirs = (_step(stepper, slots, counts, tokens, 63) for stepper in (gpu, cpu))
        for name in ("next_tokens", "top_tokens"):
            assert (getattr(ours, name) == getattr(theirs, name)).all()
        for name in ("top_logprobs", "logprobs", "logits", "states", "gates"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=TOLERANCE, err_msg=name)
        assert ours.compute_seconds > 0


def test_tickets_are_collected_in_order_while_the_next_tick_runs(tmp_path: Path) -> None:
    directory = _write(tmp_path, "lstm", "tokens")
    ahead, waiting = _load(directory), _load(directory)
    slots, counts = np.arange(1, 9), np.ones(8, np.int64)
    random = np.random.default_rng(0)
    ticks = [random.integers(0, VOCAB, 8).astype(np.uint32) for _ in range(20)]
    wants = np.full(8, Want.STATE, np.uint8)
    tickets = [ahead.submit(slots, counts, tokens, wants, 0) for tokens in ticks]
    for ticket, tokens in zip(tickets, ticks, strict=True):
        expected = _step(waiting, slots, counts, tokens, Want.STATE).states
        np.testing.assert_array_equal(ahead.collect(ticket).states, expected)


def test_generated_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    directory = _write(tmp_path, "gru", "tokens")
    results = []
    for device in ("cuda", "cpu"):
        stepper = _load(directory, device=device)
        ticket = stepper.submit_generate(
            np.arange(1, 9),
            np.array([20, 20, 7, 20, 1, 20, 13, 20]),
            np.zeros(8, np.int64),
            np.arange(8, dtype=np.uint64),
            np.linspace(0, 1.4, 8, dtype=np.float32),
            np.array([0, 0, 5, 5, 0, 0, 1, 3]),
            np.array([1, 1, 1, 0.8, 0.5, 0.9, 1, 1], dtype=np.float32),
            np.full((8, 1), -1),
        )
        results.append(stepper.collect(ticket))
    assert results[0].counts.tolist() == results[1].counts.tolist() == [20, 20, 7, 20, 1, 20, 13, 20]
    for row, count in enumerate(results[0].counts):
        ours, theirs = results
        assert (ours.tokens[row, :count] == theirs.tokens[row, :count]).all()
        np.testing.assert_allclose(ours.logprobs[row, :count], theirs.logprobs[row, :count], atol=TOLERANCE)


def test_deterministic_sessions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    stepper = _load(_write(tmp_path, "gru", "tokens"), deterministic=True)
    random = np.random.default_rng(0)
    session = random.integers(0, VOCAB, 12).astype(np.uint32)

    def trace(others: int, length: int) -> list[bytes]:
        stepper.zero_rows(np.arange(1, 65))
        found = []
        for first in range(0, 12, length):
            counts = random.integers(1, 4, others + 1)
            counts[-1] = length
            tokens = random.integers(0, VOCAB, int(counts.sum())).astype(np.uint32)
            tokens[-length:] = session[first : first + length]
            slots = np.concatenate((np.arange(2, 2 + others), [1]))
            result = _step(stepper, slots, counts, tokens, 63)
            columns = (result.logits, result.states, result.logprobs, result.top_logprobs)
            found += [b"".join(column[row].tobytes() for column in columns) for row in range(-length, 0)]
        return found

    alone = trace(0, 1)
    for others, length in ((0, 4), (1, 1), (7, 3), (23, 2), (22, 12)):
        assert trace(others, length) == alone


def test_copied_and_written_rows_go_on_as_they_were(tmp_path: Path) -> None:
    stepper = _load(_write(tmp_path, "lstm", "tokens"))
    states = np.random.default_rng(0).uniform(-1, 1, (3, 2, 18)).astype(np.float32)
    stepper.write_rows(np.array([5, 6, 7]), states)
    stepper.copy_rows(np.array([5, 6]), np.array([6, 5]))
    stepper.zero_rows(np.array([7]))
    assert stepper.read_rows(np.array([6, 5])).tobytes() == states[:2].tobytes()
    assert not stepper.read_rows(np.array([7])).any()
