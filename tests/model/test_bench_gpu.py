"""What of `make bench-gpu` runs without a GPU: its checks, the roof, the table and the goals."""

from __future__ import annotations

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: skip: before any kernel

from bench.gpu import Row, Timing, goal_lines, main, roof, table_header, table_line
from cellserve_model.equations import EQUATIONS


def _row(cell: str, num_rows: int, **microseconds: float) -> Row:
    timings = {name: Timing(value, value, value) for name, value in microseconds.items()}
    return Row(cell, 1024, num_rows, 1e-3, timings, roof=2.0)


def test_the_checks_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--cells", "gru", "lstm", "--hidden", "9", "--rows", "1", "70"]) == 0
    printed = capsys.readouterr().out
    assert "gru H=9: largest error" in printed
    assert "lstm H=9: largest error" in printed


def test_a_kernel_that_is_off_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = EQUATIONS["vanilla_rnn"]
    monkeypatch.setitem(EQUATIONS, "vanilla_rnn", lambda inputs, state, layer: exact(inputs + 0.02, state, layer))
    assert main(["--check", "--cells", "vanilla_rnn", "--hidden", "9", "--rows", "1"]) == 1
    assert "vanilla_rnn, H=9" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert DEVICE.type == "cpu"
    assert main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hidden_size", "num_rows", "expected"),
    # Worked out by hand from the shapes, at 4.3 TB/s and 790 TFLOP/s: memory, memory, arithmetic, memory.
    [(256, 1024, 0.95), (1024, 1, 1.47), (1024, 1024, 8.16), (512, 64, 0.47)],
)
def test_the_roof_is_the_slower_of_bytes_and_arithmetic(hidden_size: int, num_rows: int, expected: float) -> None:
    assert roof("gru", hidden_size, num_rows, 4.3e6, 790e6) == pytest.approx(expected, abs=0.01)


def test_rows_are_judged_by_their_goals() -> None:
    rows = [
        _row("gru", 64, ours=8.0, empty_graph=4.0, product=3.0, eager=50.0, cudnn=30.0),
        _row("gru", 1024, ours=21.0, empty_graph=4.0, product=12.0, eager=50.0, cudnn=30.0),
        _row("gru_reset_after", 1024, ours=14.0, empty_graph=4.0, product=12.0, eager=50.0, cudnn=30.0),
    ]
    assert goal_lines(rows) == [
        "met    gru H=1024 B=64: ours / (empty graph + roof) 1.33, goal <= 1.5",
        "met    gru H=1024 B=64: eager / ours 6.25, goal >= 5.0",
        "MISSED gru H=1024 B=1024: product / ours 0.57, goal >= 0.6",
        "met    gru_reset_after H=1024 B=1024: product / ours 0.86, goal >= 0.6",
        "met    gru_reset_after H=1024 B=1024: cuDNN / ours 2.14, goal >= 1.0",
        "MISSED gru H=1024 B=1024: reset-before / reset-after 1.50, goal <= 1.4",
    ]


def test_the_table_has_one_width() -> None:
    row = _row("leaky_rnn", 16384, ours=123.4, empty_graph=4.0, product=3.0)
    assert len(table_line(row)) == len(table_header())
    assert table_line(row).split()[:4] == ["leaky_rnn", "1024", "16384", "123.40"]
