"""The benchmarks' statistics and rows: intervals that hold what they say, verdicts that can go either way."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.report import print_rows, write_json
from bench.rows import Goal, Row
from bench.statistics import median, median_interval, quartiles


def test_the_interval_of_a_median_holds_the_true_one_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    true_median = 1.0  # of a lognormal with mu 0
    held = 0
    for _ in range(400):
        low, high = median_interval(random.lognormal(0.0, 0.2, 20).tolist())
        held += low <= true_median <= high
    assert 0.91 < held / 400 < 0.985


def test_more_pairs_give_a_narrower_interval() -> None:
    random = np.random.default_rng(1)
    widths = []
    for number in (20, 80, 320):
        low, high = median_interval(random.normal(1.0, 0.1, number).tolist())
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_quartiles_enclose_the_middle_half() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert median([1.0, 10.0, 2.0]) == 2.0


def make_row(ours: list[float], limits: list[float], goal: Goal | None = None) -> Row:
    row = Row("X1", "a thing", {"H": 4096, "kind": "fast"}, "tokens/s", "its limit", goal)
    for mine, limit in zip(ours, limits, strict=True):
        row.add(mine, limit, p99_ms=1.5)
    return row


def test_a_ratio_is_the_median_of_the_turns_not_the_ratio_of_medians() -> None:
    # The machine is three times as fast in the second turn, for both.
    row = make_row([10.0, 30.0, 8.0], [20.0, 60.0, 8.0])
    assert row.ratio == 0.5
    assert row.ratios == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal(">=", 0.5), True),
        (Goal(">=", 0.51), False),
        (Goal("<=", 0.5), True),
        (Goal("<=", 0.49), False),
        (Goal(">=", 10.0, of="ours"), True),
        (Goal(">=", 10.1, of="ours"), False),
        (None, None),
    ],
)
def test_a_goal_is_met_or_missed(goal: Goal | None, is_met: bool | None) -> None:
    assert make_row([10.0], [20.0], goal).is_met is is_met


def test_an_interval_needs_twenty_pairs() -> None:
    assert make_row([1.0] * 19, [1.0] * 19).interval is None
    assert make_row([1.0] * 20, [1.0] * 20).interval == (1.0, 1.0)


def test_a_row_without_a_limit_has_no_ratio() -> None:
    row = Row("X1", "a thing", {}, "ms")
    row.add(3.0, None)
    assert (row.ratio, row.name, row.document()["limit"]) == (None, "a thing", None)


def test_the_table_and_the_file_say_the_same(tmp_path: Path) -> None:
    rows = [make_row([10.0, 12.0], [20.0, 20.0], Goal(">=", 0.9)), make_row([19.0], [20.0], Goal(">=", 0.9))]
    written = io.StringIO()
    print_rows(Console(file=written, width=300), rows)
    lines = written.getvalue().splitlines()
    assert "H=4,096, fast" in lines[1]
    assert ">= 0.9 MISSED" in lines[1]
    assert ">= 0.9 reached" in lines[2]
    assert "2 goals, 1 missed" in written.getvalue()
    write_json(tmp_path / "bench.json", {"processor": "here"}, rows)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["machine"] == {"processor": "here"}
    assert [(row["ours"], row["is_met"]) for row in document["rows"]] == [(11.0, False), (19.0, True)]
    assert document["rows"][0]["samples"] == {"ours": [10.0, 12.0], "limits": [20.0, 20.0], "p99 ms": [1.5, 1.5]}
