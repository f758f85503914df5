"""The load generator's parts: when requests are due, what they are, and the search for the most sessions."""

import numpy as np
import pytest

from cellserve.errors import QueueFull
from cellserve.load import (
    LoadResult,
    Mix,
    MixError,
    Recorder,
    Work,
    even_times,
    most_sessions,
    parse_mix,
    poisson_times,
)


def test_poisson_times_are_ascending_within_the_load_and_as_many_as_the_rate_says() -> None:
    times = poisson_times(200.0, 50.0, np.random.default_rng(1))
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 50.0
    assert abs(len(times) - 10_000) < 5 * 100  # five standard deviations of the Poisson distribution


def test_gaps_between_poisson_times_are_exponentially_distributed() -> None:
    gaps = np.diff(poisson_times(1000.0, 100.0, np.random.default_rng(2)))
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    # Kolmogorov-Smirnov against 1 - exp(-1000 t); 1.95 / sqrt(n) is the bound that one in a thousand passes.
    ordered = np.sort(gaps)
    distance = np.abs(1 - np.exp(-1000 * ordered) - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance < 1.95 / np.sqrt(len(ordered))


def test_requests_of_many_sessions_together_come_as_one_poisson_process() -> None:
    random = np.random.default_rng(3)
    joined = np.concatenate([poisson_times(2.0, 100.0, random) for _ in range(100)])
    in_each_second = np.bincount(joined.astype(int), minlength=100)
    assert in_each_second.mean() == pytest.approx(200, rel=0.03)
    assert 0.6 < in_each_second.var() / in_each_second.mean() < 1.5  # 1 for a Poisson process


def test_even_times_lie_at_equal_distances_from_a_random_first_one() -> None:
    times = [even_times(50.0, 2.0, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.diff(column) == pytest.approx(0.02) for column in times)
    assert all(0 <= column[0] < 0.02 and column[-1] < 2.0 and len(column) in (99, 100) for column in times)
    assert len({column[0] for column in times}) == 20


def test_a_mix_is_drawn_by_its_weights() -> None:
    mix = parse_mix("step:8,run16:1,generate:1")
    assert mix == Mix((Work("step", 1), Work("step", 16), Work("generate", 16)), (8, 1, 1))
    assert [work.name for work in mix.works] == ["step", "run16", "generate16"]
    assert mix.tokens_per_request == pytest.approx(4.0)
    drawn = mix.draw(10_000, np.random.default_rng(0))
    assert drawn.count(Work("step", 1)) / 10_000 == pytest.approx(0.8, abs=0.02)
    assert drawn.count(Work("generate", 16)) / 10_000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("text", ["", "steps", "step:-1", "step4", "run0", "step:0", "run:1;step:1", "step,,run"])
def test_a_mix_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(MixError):
        parse_mix(text)


def test_a_result_counts_what_was_recorded() -> None:
    recorder, step, run = Recorder(), Work("step", 1), Work("step", 16)
    for milliseconds in range(1, 101):
        recorder.answered(step, milliseconds / 1000)
    recorder.answered(run, 1.0)
    recorder.failed(QueueFull("full"))
    recorder.failed(QueueFull("full"))
    recorder.sent_late(0.001)
    result = recorder.result(2.0)
    assert (result.num_requests, result.num_tokens, result.tokens_per_second) == (101, 116, 58.0)
    assert result.quantile(0.5, "step") == pytest.approx(0.0505)
    assert result.quantile(1.0) == 1.0
    assert (result.failures, result.num_failures) == ({"QUEUE_FULL": 2}, 2)
    assert result.send_lag(0.99) == pytest.approx(0.001)


def test_an_empty_result_has_no_latencies() -> None:
    result = Recorder().result(1.0)
    assert result.quantile(0.99) is None
    assert result.send_lag(0.99) is None


def result_with(p99_seconds: float, failures: dict[str, int] | None = None) -> LoadResult:
    return LoadResult(1.0, 10, {"step": np.full(10, p99_seconds)}, np.empty(0), failures or {})


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 100, 1000, 5000])
@pytest.mark.parametrize("first", [1, 64, 3000])
async def test_the_search_finds_the_most_sessions_to_a_tenth(capacity: int, first: int) -> None:
    asked = []

    async def attempt(num_sessions: int) -> LoadResult:
        asked.append(num_sessions)
        return result_with(0.001 if num_sessions <= capacity else 0.1)

    trials = await most_sessions(attempt, first=first, target_p99_seconds=0.01, max_sessions=4096)
    held = max(trial.num_sessions for trial in trials if trial.met)
    assert held <= capacity
    assert held >= min(capacity, 4096) / 1.1 - 1
    assert len(asked) == len(set(asked)) == len(trials) < 30


async def test_the_search_tells_that_not_even_one_session_meets_the_target() -> None:
    async def attempt(_: int) -> LoadResult:
        return result_with(0.1)

    trials = await most_sessions(attempt, first=8, target_p99_seconds=0.01, max_sessions=64)
    assert [trial.num_sessions for trial in trials] == [8, 4, 2, 1]
    assert not any(trial.met for trial in trials)


async def test_a_load_of_which_something_was_refused_misses_the_target() -> None:
    async def attempt(num_sessions: int) -> LoadResult:
        return result_with(0.001, {"QUEUE_FULL": 1} if num_sessions > 16 else None)

    trials = await most_sessions(attempt, first=16, target_p99_seconds=0.01, max_sessions=64)
    assert max(trial.num_sessions for trial in trials if trial.met) == 16
