"""How much a tick takes: by how long tokens take, and by how many sessions wait."""

import pytest

from cellserve_service.pace import (
    FIRST_TICK_TOKENS,
    MAX_SLICE_TOKENS,
    PARTS_SECONDS,
    ROWS_SECONDS,
    SINGLES_SECONDS,
    SLICE_TOKENS,
    SLICE_TOKENS_BESIDE_SINGLES,
    Pace,
)
from cellserve_service.runs import Batch


@pytest.fixture
def pace() -> Pace:
    """Of a model whose ticks are quick, however large."""
    pace = Pace(efficient_batch=128)
    for batch in (Batch.SINGLES, Batch.PARTS):
        pace.took(batch, 1000, 1e-6)
    return pace


def taken(pace: Pace, num_ready: int, batch: int = Batch.SINGLES) -> int:
    number = min(num_ready, pace.num_rows(batch, num_ready))
    pace.num_left[batch] = num_ready - number
    return number


def test_few_sessions_are_taken_together(pace: Pace) -> None:
    for number in (1, 100, 128):
        assert taken(pace, number) == number


def test_many_are_taken_in_two_halves_whatever_was_before(pace: Pace) -> None:
    for number in (256, 4096, 1000, 256):
        assert taken(pace, number) == number // 2
        assert taken(pace, pace.num_left[Batch.SINGLES]) == number // 2


def test_a_tick_takes_as_many_tokens_as_the_last_ones_speed_allows(pace: Pace) -> None:
    pace.took(Batch.SINGLES, 100, 100 * ROWS_SECONDS / 500)
    assert taken(pace, 10_000) == pytest.approx(500, abs=1)
    assert taken(pace, 10_000, Batch.PARTS) == 5_000
    pace.took(Batch.PARTS, 100, 100 * PARTS_SECONDS / 500)
    assert pace.num_tokens(1.0) == pytest.approx(500, abs=1)
    for batch in (Batch.SINGLES, Batch.PARTS):
        pace.took(batch, 10, 1.0)
        assert taken(pace, 10_000, batch) == 128
    assert pace.num_tokens(1.0) == 0


def test_long_runs_take_smaller_parts_for_a_moment_after_single_tokens(pace: Pace) -> None:
    pace.took(Batch.PARTS, 100, 100 * PARTS_SECONDS / 500)
    small = pytest.approx(500 * ROWS_SECONDS / PARTS_SECONDS, abs=1)
    pace.note_singles(1.0)
    assert pace.num_tokens(1.0) == pace.num_tokens(1.0 + SINGLES_SECONDS / 2) == small
    assert pace.num_tokens(1.0 + SINGLES_SECONDS) == pytest.approx(500, abs=1)


def test_generates_take_slices_worth_a_message_of_half_a_batch(pace: Pace) -> None:
    pace.took(Batch.GENERATES, 100, 100 * PARTS_SECONDS / 500)
    assert taken(pace, 1000, Batch.GENERATES) == 64
    assert pace.slice_tokens(1.0, 64) == SLICE_TOKENS
    assert pace.slice_tokens(1.0, 50) == pytest.approx(10, abs=1)
    assert pace.slice_tokens(1.0, 5) == MAX_SLICE_TOKENS
    pace.note_singles(1.0)
    assert pace.slice_tokens(1.0, 64) == SLICE_TOKENS_BESIDE_SINGLES
    assert pace.slice_tokens(1.0, 30) == pytest.approx(500 * ROWS_SECONDS / PARTS_SECONDS / 30, abs=1)
    assert pace.slice_tokens(1.0 + SINGLES_SECONDS, 64) == SLICE_TOKENS


def test_before_the_first_tick_its_speed_is_a_guess() -> None:
    pace = Pace(efficient_batch=16)
    assert pace.num_tokens(1.0) == pytest.approx(FIRST_TICK_TOKENS, abs=1)
    assert taken(pace, 10_000) == pytest.approx(FIRST_TICK_TOKENS * ROWS_SECONDS / PARTS_SECONDS, abs=1)


def test_a_device_that_takes_all_at_once_is_given_all() -> None:
    pace = Pace(efficient_batch=4096)
    pace.took(Batch.SINGLES, 10, 1.0)
    assert taken(pace, 4000) == 4000
