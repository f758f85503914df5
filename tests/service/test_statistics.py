"""What is counted, and that counting many values is counting each."""

import numpy as np

from cellserve_service.limits import EngineLimits
from cellserve_service.statistics import Histogram, seconds_bounds
from tests.service.driving import UNARY, Driver, Row


def test_buckets_begin_at_50_microseconds_with_a_ratio_of_at_most_one_and_a_half() -> None:
    bounds = seconds_bounds()
    assert bounds[0] == 50e-6
    assert bounds[-1] >= 60
    assert (bounds[1:] / bounds[:-1] <= 1.51).all()


def test_counting_many_values_is_counting_each() -> None:
    values = np.array([1e-6, 50e-6, 51e-6, 0.01, 0.02, 59.0, 1e9])
    together, apart = Histogram(seconds_bounds()), Histogram(seconds_bounds())
    together.observe(values)
    for value in values.tolist():
        apart.observe_one(value)
    assert together.counts.tolist() == apart.counts.tolist()
    assert together.counts.sum() == len(values)
    assert together.counts[0] == 2
    assert together.counts[-1] == 1
    assert together.total == apart.total


def test_tokens_ticks_and_waiting_times_are_counted() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=2))
    driver.open(UNARY, ["a"], unary=True)
    driver.run(UNARY, Row("a", [1, 2, 3]))
    driver.pass_time(0.5)
    driver.begin()
    driver.pass_time(0.25)
    driver.finish()
    driver.begin()
    driver.finish()
    driver.generate("a", 20)
    driver.settle()
    model = driver.statistics.models[0]
    assert (model.steps_run, model.steps_generated) == (3, 20)
    assert model.step_queue.counts.sum() == 1
    assert model.step_queue.total == 0.5
    assert model.tick_duration.total == 0.25
    assert model.tick_duration.counts.sum() == model.batch_size.counts.sum() == 4
    assert model.inter_token.counts.sum() == 4
    assert model.sessions_opened == 1


def test_refusals_and_ends_are_counted_by_reason() -> None:
    driver = Driver(EngineLimits(max_sessions=1))
    driver.open(UNARY, ["a"], unary=True)
    driver.open(UNARY, ["b"], unary=True)
    driver.run(UNARY, Row("a", [99]))
    driver.close(UNARY, "a")
    assert driver.statistics.run_failures == {"SESSION_LIMIT": 1, "INVALID_INPUT": 1}
    assert driver.statistics.sessions_rejected == {"SESSION_LIMIT": 1}
    assert driver.statistics.sessions_closed == {"SESSION_CLOSED": 1}
    assert driver.statistics.session_lifetime.counts.sum() == 1
