"""What `cellserve top` makes of Prometheus text, compared with values counted by hand."""

import math
from pathlib import Path

import pytest

from cellserve.cli.metrics import Histogram, MetricsError, parse_metrics, read_metrics
from cellserve.cli.top import view_between

EARLIER = """
# TYPE cellserve_sessions gauge
cellserve_sessions{model="a",tier="device"} 3
cellserve_sessions{model="a",tier="host"} 1
cellserve_sessions{model="b",tier="device"} 10
# TYPE cellserve_session_capacity gauge
cellserve_session_capacity 100
# TYPE cellserve_steps counter
cellserve_steps_total{kind="run",model="a"} 1000
cellserve_steps_total{kind="generate",model="a"} 50
cellserve_steps_total{kind="run",model="b"} 7
# TYPE cellserve_step_duration_seconds histogram
cellserve_step_duration_seconds_bucket{le="0.001",model="a"} 100
cellserve_step_duration_seconds_bucket{le="0.002",model="a"} 100
cellserve_step_duration_seconds_bucket{le="+Inf",model="a"} 100
cellserve_step_duration_seconds_sum{model="a"} 0.05
cellserve_step_duration_seconds_count{model="a"} 100
# TYPE cellserve_run_failures counter
cellserve_run_failures_total{reason="INVALID_INPUT"} 2
"""
LATER = """
# TYPE cellserve_sessions gauge
cellserve_sessions{model="a",tier="device"} 4
cellserve_sessions{model="a",tier="host"} 0
cellserve_sessions{model="b",tier="device"} 10
# TYPE cellserve_session_capacity gauge
cellserve_session_capacity 100
# TYPE cellserve_steps counter
cellserve_steps_total{kind="run",model="a"} 1400
cellserve_steps_total{kind="generate",model="a"} 60
cellserve_steps_total{kind="run",model="b"} 7
# TYPE cellserve_step_duration_seconds histogram
cellserve_step_duration_seconds_bucket{le="0.001",model="a"} 200
cellserve_step_duration_seconds_bucket{le="0.002",model="a"} 400
cellserve_step_duration_seconds_bucket{le="+Inf",model="a"} 500
cellserve_step_duration_seconds_sum{model="a"} 0.8
cellserve_step_duration_seconds_count{model="a"} 500
# TYPE cellserve_run_failures counter
cellserve_run_failures_total{reason="INVALID_INPUT"} 2
cellserve_run_failures_total{reason="QUEUE_FULL"} 5
"""


def test_a_view_counts_what_happened_between_two_readings() -> None:
    earlier = parse_metrics(EARLIER, at_seconds=10.0)
    later = parse_metrics(LATER, at_seconds=12.0)
    view = view_between(earlier, later, {"model": "a"})
    assert view.tokens_per_second == 205.0
    assert view.sessions_by_tier == {"device": 4, "host": 0}
    assert view.session_capacity == 100
    assert view.num_steps_total == 1460
    assert view.failures_by_reason == {"QUEUE_FULL": 5}
    # Of the 400 steps between, 100 took at most 1 ms and 200 more at most 2 ms: the middle one lies half way
    # between.
    assert view.step_p50_seconds == pytest.approx(0.0015)
    assert view.step_p99_seconds == pytest.approx(0.002)


def test_a_view_of_all_models_adds_them_up() -> None:
    earlier, later = parse_metrics(EARLIER, at_seconds=0.0), parse_metrics(LATER, at_seconds=1.0)
    view = view_between(earlier, later, {})
    assert view.sessions_by_tier == {"device": 14, "host": 0}
    assert view.num_steps_total == 1467


def test_a_server_that_was_restarted_between_is_counted_from_its_start() -> None:
    before, after = parse_metrics(LATER, at_seconds=0.0), parse_metrics(EARLIER, at_seconds=1.0)
    view = view_between(before, after, {"model": "a"})
    assert view.tokens_per_second == 1050.0
    assert view.step_p99_seconds == pytest.approx(0.00099)


def test_nothing_counted_has_no_quantile_and_no_mean() -> None:
    empty = Histogram((0.1, math.inf), (0.0, 0.0), 0.0)
    assert empty.quantile(0.5) is None
    assert empty.mean is None


def test_a_quantile_above_every_finite_bound_is_the_last_of_them() -> None:
    assert Histogram((0.1, math.inf), (1.0, 100.0), 50.0).quantile(0.99) == 0.1


@pytest.mark.parametrize(
    ("url", "said"),
    [("localhost:9464/metrics", "no http address"), ("http://127.0.0.1:1/metrics", "no metrics at")],
)
def test_an_endpoint_that_does_not_answer_is_named(url: str, said: str) -> None:
    with pytest.raises(MetricsError, match=said):
        read_metrics(url)


def test_text_that_is_not_prometheus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="not Prometheus text"):
        parse_metrics("<html>{</html>", at_seconds=0.0)
