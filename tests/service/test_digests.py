"""Digests tell a repeat from another run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cellserve_service.digests import digest_runs, digest_settings, digest_tokens
from tests.service.profiles import QUICK

RUNS = st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), min_size=1, max_size=6)


def _digest(*runs: list[int]) -> list[int]:
    tokens = np.array([token for run in runs for token in run], np.uint32)
    digests: list[int] = digest_runs(tokens, np.array([len(run) for run in runs], np.int64)).tolist()
    return digests


@QUICK
@given(RUNS)
def test_a_run_has_the_same_digest_whatever_runs_stand_beside_it(runs: list[list[int]]) -> None:
    assert _digest(*runs) == [_digest(run)[0] for run in runs]


@QUICK
@given(RUNS)
def test_different_runs_of_equal_length_have_different_digests(runs: list[list[int]]) -> None:
    by_run = {tuple(run): digest for run, digest in zip(runs, _digest(*runs), strict=True)}
    assert len({(len(run), digest) for run, digest in by_run.items()}) == len(by_run)


def test_the_order_of_the_tokens_counts() -> None:
    assert len(set(_digest([1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 3, 2]))) == 4
    assert len(set(_digest([0, 1], [1, 0], [0, 0], [1, 1]))) == 4


@QUICK
@given(arrays(np.uint32, st.integers(1, 20)))
def test_single_tokens_have_the_digests_of_runs_of_one(tokens: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
    assert digest_tokens(tokens).tolist() == digest_runs(tokens, np.ones(len(tokens), np.int64)).tolist()


def test_vectors_are_told_apart_by_every_number_and_its_place() -> None:
    vectors = np.array([[1, 2], [3, 4], [1, 2], [4, 3], [2, 1], [3, 4]], np.float32)
    assert len(set(digest_runs(vectors, np.full(3, 2)).tolist())) == 3
    assert len(set(digest_runs(vectors, np.ones(6, np.int64)).tolist())) == 4


def test_a_quarter_million_single_tokens_do_not_collide() -> None:
    assert len(np.unique(digest_tokens(np.arange(2**18, dtype=np.uint32)))) == 2**18


def test_sampling_settings_are_told_apart() -> None:
    settings = [(1.0, 0, 1.0, 5, ()), (1.0, 0, 1.0, 6, ()), (0.5, 0, 1.0, 5, ()), (1.0, 0, 1.0, 5, (1,))]
    assert len({digest_settings(*each) for each in settings}) == 4
    assert digest_settings(0.25, (1, 2)) == digest_settings(0.25, (1, 2))
