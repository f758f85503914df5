"""Sampling on the device against sampling on the CPU: the same uniform numbers to the bit, and the same choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.support.interpreter import DEVICE, IS_INTERPRETED  # isort: skip: before any kernel

from cellserve_model import ModelError, load_stepper
from cellserve_model.cuda.sampling_kernels import sample_kernel, uniform
from cellserve_model.sampling import SamplingSettings, sample, uniforms
from tests.model.cuda_models import make_cuda_stepper
from tests.support.models import write_tiny_model

if not IS_INTERPRETED:
    pytestmark = pytest.mark.gpu

VOCAB = 7


@triton.jit  # type: ignore[untyped-decorator]
def _uniform_kernel(seeds, positions, out, count: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, count)
    tl.store(out + rows, uniform(tl.load(seeds + rows), tl.load(positions + rows)))


def test_uniform_numbers_are_those_of_the_cpu_to_the_bit() -> None:
    random = np.random.default_rng(0)
    seeds = torch.from_numpy(random.integers(-(2**63), 2**63, 1024))
    positions = torch.from_numpy(random.integers(0, 2**63, 1024) >> random.integers(0, 62, 1024))
    found = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    _uniform_kernel[(1,)](seeds.to(DEVICE), positions.to(DEVICE), found, count=1024)
    assert torch.equal(found.cpu(), uniforms(seeds, positions))


def _choices(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
) -> torch.Tensor:
    """What the kernel chooses from logits (B, V), in blocks of 16 ids."""
    num_rows, num_tokens = logits.shape
    num_outputs = triton.cdiv(num_tokens, 16) * 16
    padded = torch.full((num_rows, num_outputs), -torch.inf)
    padded[:, :num_tokens] = logits
    counts = torch.zeros(4, num_rows, dtype=torch.int32, device=DEVICE)
    counts[1] = 2
    tokens = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    sample_kernel[(num_rows,)](
        logits=padded.to(DEVICE),
        likeliest=logits.argmax(1).int().to(DEVICE),
        totals=torch.logsumexp(logits, 1).to(DEVICE),
        seeds=seeds.to(DEVICE),
        positions=positions.to(DEVICE),
        temperatures=temperatures.to(DEVICE),
        top_ks=top_ks.int().to(DEVICE),
        top_ps=top_ps.to(DEVICE),
        stops=torch.full((num_rows, 1), -1, dtype=torch.int32, device=DEVICE),
        num_stops=1,
        tokens=tokens,
        done=counts[0],
        alive=counts[1],
        counts=counts[2],
        limits=counts[2] + 1,
        out_tokens=counts[3],
        out_logprobs=torch.zeros(num_rows, device=DEVICE),
        out_stride=num_rows,
        num_outputs=num_outputs,
        num_tokens=num_tokens,
        block=16,
    )
    return tokens.cpu().long()


@pytest.mark.parametrize("seed", range(4))
def test_choices_equal_those_of_the_cpu(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_rows, num_tokens = 40, (7, 16, 33, 50)[seed]
    values = 3 * random.standard_normal((num_rows, num_tokens))
    # Some logits of a row are equal, some zeros are negative, and some tokens all but impossible.
    values = np.where(random.random(values.shape) < 0.4, np.round(values), values)
    values = np.where(random.random(values.shape) < 0.1, -200.0, values)
    logits = torch.from_numpy(values.astype(np.float32))
    seeds = torch.from_numpy(random.integers(-(2**63), 2**63, num_rows))
    positions = torch.from_numpy(random.integers(0, 2**40, num_rows))
    temperatures = torch.from_numpy(random.choice([0.0, 0.01, 0.7, 1.0, 5.0], num_rows).astype(np.float32))
    top_ks = torch.from_numpy(random.choice([0, 1, 3, num_tokens, 2 * num_tokens], num_rows))
    top_ps = torch.from_numpy(random.choice([1.0, 0.999, 0.9, 0.33, 0.0001], num_rows).astype(np.float32))
    settings = SamplingSettings(temperatures.double(), top_ks, top_ps.double(), all_greedy=False, any_filter=True)
    expected = sample(logits, uniforms(seeds, positions), settings)
    found = _choices(logits, seeds, positions, temperatures, top_ks, top_ps)
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) > 3  # not one choice for all


@pytest.mark.parametrize("num_stops", [0, 2, 20])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_generated_tokens_and_the_states_they_leave_are_those_of_the_cpu(
    tmp_path: Path, cell: str, num_stops: int
) -> None:
    write_tiny_model(tmp_path, cell, num_layers=2, hidden_size=9, vocab_size=VOCAB, output_size=VOCAB)
    ours = make_cuda_stepper(tmp_path)
    theirs = load_stepper(tmp_path, name="tiny", version=1, device="cpu", num_slots=32, max_batch=20)
    random = np.random.default_rng(0)
    stops = random.integers(0, 3, (6, num_stops)) if num_stops else np.full((6, 1), -1)
    stops[0] = -1
    slots = random.permutation(np.arange(1, 33))[:6]
    for num_tokens in (np.full(6, 5), np.full(6, 2), np.array([4, 1, 3, 2, 4, 1])):
        request = (
            slots,
            num_tokens,
            random.integers(0, 99, 6),
            random.integers(0, 2**64, 6, dtype=np.uint64),
            np.array([0, 0.3, 0.7, 1, 1.4, 1], dtype=np.float32),
            np.array([0, 0, 5, 5, 0, 1]),
            np.array([1, 1, 1, 0.8, 0.9, 1], dtype=np.float32),
            stops,
        )
        found, expected = (stepper.collect(stepper.submit_generate(*request)) for stepper in (ours, theirs))
        assert found.counts.tolist() == expected.counts.tolist()
        assert found.num_padding_rows == 10 * num_tokens.max()
        for row, count in enumerate(found.counts):
            assert found.tokens[row, :count].tolist() == expected.tokens[row, :count].tolist()
            np.testing.assert_allclose(found.logprobs[row, :count], expected.logprobs[row, :count], atol=2e-5)
        everything = np.arange(1, 33)
        np.testing.assert_allclose(ours.read_rows(everything), theirs.read_rows(everything), atol=2e-5)
    if num_stops == 20:
        assert (found.counts < num_tokens).any()  # a row has stopped


def test_more_tokens_than_there_is_room_for_at_once_are_copied_out_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path, "vanilla_rnn", hidden_size=9, vocab_size=VOCAB, output_size=VOCAB)
    monkeypatch.setattr("cellserve_model.cuda.generation._TOKENS_AT_ONCE", 3)
    results = []
    for stepper in (
        make_cuda_stepper(tmp_path),
        load_stepper(tmp_path, name="tiny", version=1, device="cpu", num_slots=32, max_batch=20),
    ):
        warm = np.ones(2, dtype=np.float32)
        ticket = stepper.submit_generate(
            np.array([3, 4]),
            np.array([7, 4]),
            np.array([0, 5]),
            np.array([1, 2], np.uint64),
            warm,
            np.zeros(2, np.int64),
            warm,
            np.full((2, 1), -1),
        )
        result = stepper.collect(ticket)
        assert result.counts.tolist() == [7, 4]
        results.append([result.tokens[0].tolist(), result.tokens[1, :4].tolist()])
    assert results[0] == results[1]


def test_a_model_without_an_output_for_each_token_cannot_generate(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gru", hidden_size=9, vocab_size=VOCAB, output_size=3)
    one, ones = np.array([1]), np.ones(1, dtype=np.float32)
    with pytest.raises(ModelError, match="cannot generate"):
        make_cuda_stepper(tmp_path).submit_generate(
            one, one, one, one.astype(np.uint64), ones, one, ones, np.full((1, 1), -1)
        )
