"""Sampling: the generator against Random123's vectors, the distribution against numpy, generation against both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellserve_model import GenerateResult, Stepper
from cellserve_model.sampling import SamplingSettings, philox4x32, sample, uniforms
from tests.model.loading import LoadStepper
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

# kat_vectors of Random123 1.14, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = _words(counter)
    k0, k1 = _words(key)
    found = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in found] == [int(word) for word in _words(expected)]


def _philox_in_python(seed: int, position: int) -> float:
    """Philox4x32-10 in Python's integers, as the paper writes it, and the 53 bits taken from it."""
    c = [position & 0xFFFFFFFF, position >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))
def test_uniform_numbers_are_those_of_the_paper(seed: int, position: int) -> None:
    seeds = torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))
    assert float(uniforms(seeds, torch.tensor([position]))) == _philox_in_python(seed, position)


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    count = 100_000
    for seeds, positions in (
        (torch.zeros(count, dtype=torch.int64), torch.arange(count)),
        (torch.arange(count), torch.zeros(count, dtype=torch.int64)),
    ):
        values = uniforms(seeds, positions).numpy()
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, bins=100, range=(0, 1))
        # The statistic's mean is 99, its deviation 14; a fixed sequence, so this passes always or never.
        assert ((counts - count / 100) ** 2 / (count / 100)).sum() < 150


def _filtered(logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """The distribution that one row samples from, spelled out."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = list(order[:top_k]) if top_k > 0 else list(order)
    if top_p < 1:
        total, inside = sum(probabilities[token] for token in kept), 0.0
        nucleus = []
        for token in kept:
            nucleus.append(token)
            inside += probabilities[token]
            if inside >= top_p * total:
                break
        kept = nucleus
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    filtered: NDArray[np.float64] = result / result.sum()
    return filtered


def _settings(rows: list[tuple[float, int, float]]) -> SamplingSettings:
    return SamplingSettings(
        temperatures=torch.tensor([row[0] for row in rows], dtype=torch.float64),
        top_ks=torch.tensor([row[1] for row in rows]),
        top_ps=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        all_greedy=all(row[0] == 0 for row in rows),
        any_filter=any(row[1] > 0 or row[2] < 1 for row in rows),
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.7), (8, 0.5), (100, 1.0), (0, 1e-6)])
def test_the_sampled_frequencies_are_those_of_the_filtered_distribution(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = (2 * np.random.default_rng(0).standard_normal(20)).astype(np.float32)
    expected = _filtered(logits, temperature, top_k, top_p)
    # Evenly spread numbers invert the distribution: every frequency is right to one part in their count.
    count = 4000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = torch.from_numpy(logits).expand(count, -1)
    tokens = sample(rows, uniform, _settings([(temperature, top_k, top_p)] * count))
    frequencies = np.bincount(tokens.numpy(), minlength=20) / count
    np.testing.assert_allclose(frequencies, expected, atol=1.01 / count)
    assert (frequencies[expected == 0] == 0).all()


def test_the_ends_of_the_unit_interval_choose_possible_tokens() -> None:
    logits = torch.tensor([[-1e30, 0.0, 1.0, -1e30]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, ends, _settings([(1.0, 0, 1.0)] * 2)).tolist() == [1, 2]
    assert sample(logits, ends, _settings([(1.0, 1, 1.0)] * 2)).tolist() == [2, 2]


def test_of_equally_likely_tokens_those_with_lower_ids_stay() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 2.0, 1.0, 0.0]]).expand(300, -1)
    uniform = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    assert set(sample(logits, uniform, _settings([(1.0, 3, 1.0)] * 300)).tolist()) == {1, 2, 3}
    # The likeliest has probability 0.42, each of the three next ones 0.15.
    assert set(sample(logits, uniform, _settings([(1.0, 0, 0.5)] * 300)).tolist()) == {1, 3}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0, 1, 4]), st.sampled_from([0.3, 1.0])),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_samples_the_same_whatever_the_other_rows_ask_for(rows: list[tuple[float, int, float]]) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(len(rows), 12, generator=random)
    uniform = torch.rand(len(rows), generator=random, dtype=torch.float64)
    together = sample(logits, uniform, _settings(rows)).tolist()
    alone = [
        sample(logits[row : row + 1], uniform[row : row + 1], _settings([rows[row]])).item() for row in range(len(rows))
    ]
    assert together == alone


VOCAB = 11


def _generate(
    stepper: Stepper,
    num_tokens: int | NDArray[np.int64],
    *,
    slots: list[int],
    position: int = 0,
    temperature: float = 1.0,
    stops: list[list[int]] | None = None,
) -> GenerateResult:
    size = len(slots)
    return stepper.collect(
        stepper.submit_generate(
            np.array(slots),
            np.broadcast_to(num_tokens, size),
            np.full(size, position),
            np.array([7 * slot for slot in slots], dtype=np.uint64),
            np.full(size, temperature, dtype=np.float32),
            np.zeros(size, dtype=np.int64),
            np.ones(size, dtype=np.float32),
            np.array([[]] * size if stops is None else stops, dtype=np.int64),
        )
    )


def _model(directory: Path) -> Path:
    return write_tiny_model(directory, "gru", num_layers=2, vocab_size=VOCAB, output_size=VOCAB, seed=1)


def _expected(directory: Path, slot: int, num_tokens: int, temperature: float) -> tuple[list[int], list[float]]:
    """What a session of its own would sample, by the transcription and the generator in Python."""
    oracle, tokens, logprobs = Oracle(directory), list[int](), list[float]()
    for position in range(num_tokens):
        logits = oracle.run(tokens).logits[-1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            cumulative = np.cumsum(_filtered(logits.astype(np.float32), temperature, 0, 1.0))
            token = int(np.searchsorted(cumulative, _philox_in_python(7 * slot, position) * cumulative[-1], "right"))
        tokens.append(token)
        logprobs.append(float(logits[token] - np.log(np.exp(logits).sum())))
    return tokens, logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("counts", [[15, 15, 15], [15, 1, 8]])
def test_generated_tokens_are_those_that_the_transcription_samples(
    tmp_path: Path, load: LoadStepper, counts: list[int], temperature: float
) -> None:
    stepper = load(_model(tmp_path))
    result = _generate(stepper, np.array(counts), slots=[4, 2, 9], temperature=temperature)
    assert result.counts.tolist() == counts
    for row, slot in enumerate([4, 2, 9]):
        count = counts[row]
        tokens, logprobs = _expected(tmp_path, slot, count, temperature)
        assert result.tokens[row, :count].tolist() == tokens
        np.testing.assert_allclose(result.logprobs[row, :count], logprobs, atol=1e-5)
        state = Oracle(tmp_path).run(tokens).states[-1]
        np.testing.assert_allclose(stepper.read_rows(np.array([slot]))[0], state, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_generation_does_not_depend_on_how_it_is_cut_into_ticks(cuts: list[int]) -> None:
    whole = _generate(_stepper(), sum(cuts), slots=[3, 1])
    stepper, parts, position = _stepper(), [], 0
    for length in cuts:
        parts.append(_generate(stepper, length, slots=[1, 3], position=position).tokens[::-1])
        position += length
    assert np.concatenate(parts, axis=1).tolist() == whole.tokens.tolist()


_steppers: list[Stepper] = []


@pytest.fixture(autouse=True)
def _shared_stepper(tmp_path_factory: pytest.TempPathFactory, load: LoadStepper) -> None:
    if not _steppers:
        _steppers.append(load(_model(tmp_path_factory.mktemp("generate"))))


def _stepper() -> Stepper:
    _steppers[0].zero_rows(np.arange(1, 33))
    return _steppers[0]


def test_a_row_that_consumed_its_stop_token_moves_no_further() -> None:
    free = _generate(_stepper(), 30, slots=[1, 2, 3])
    stop = int(free.tokens[0, 6])
    first = free.tokens[0].tolist().index(stop) + 1
    result = _generate(_stepper(), 30, slots=[1, 2, 3], stops=[[-1, stop], [-1, -1], [VOCAB + 5, -1]])
    assert result.counts.tolist() == [first, 30, 30]
    assert result.tokens[0, :first].tolist() == free.tokens[0, :first].tolist()
    assert result.tokens[1:].tolist() == free.tokens[1:].tolist()
    state = _steppers[0].read_rows(np.array([1]))
    stepper = _stepper()
    _generate(stepper, first, slots=[1])
    np.testing.assert_allclose(stepper.read_rows(np.array([1])), state, atol=1e-6)


def test_a_tick_ends_once_every_row_has_stopped() -> None:
    stops = [list(range(VOCAB))] * 2
    result = _generate(_stepper(), 8, slots=[1, 2], stops=stops)
    assert result.counts.tolist() == [1, 1]
    assert result.tokens.shape == (2, 8)
