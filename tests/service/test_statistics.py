"""What is counted, and that counting many values is counting each."""

import pickle

import numpy as np
import pytest

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
    assert together.read()[0].tolist() == apart.read()[0].tolist()
    assert together.read()[0].sum() == len(values)
    assert together.read()[0][0] == 2
    assert together.read()[0][-1] == 1
    assert together.read()[1] == apart.read()[1]


def test_what_was_laid_by_is_counted_whoever_asks() -> None:
    one, other = Histogram(seconds_bounds()), Histogram(seconds_bounds())
    for number in range(1000):
        one.observe(np.array([0.001, 0.01 * number]))
        one.observe_one(0.002)
    # As it goes from a worker to the engine's process: arrays in buffers of their own, which cannot be written to.
    buffers: list[pickle.PickleBuffer] = []
    encoded = pickle.dumps(one, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    sent: Histogram = pickle.loads(encoded, buffers=[bytes(buffer) for buffer in buffers])  # noqa: S301
    other.add(one)
    for histogram in (one, sent, other):
        counts, total = histogram.read()
        assert counts.sum() == 3000
        assert total == pytest.approx(1000 * 0.003 + 0.01 * 999 * 500)
    sent.observe_one(1.0)
    assert sent.read()[0].sum() == 3001


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
    assert model.step_queue.read()[0].sum() == 1
    assert model.step_queue.read()[1] == 0.5
    assert model.tick_duration.read()[1] == 0.25
    assert model.tick_duration.read()[0].sum() == model.batch_size.read()[0].sum() == 4
    assert model.inter_token.read()[0].sum() == 4
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
    assert driver.statistics.session_lifetime.read()[0].sum() == 1
