"""The suite runs end to end in its smallest form, and a wrong answer fails it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cell_timing
from bench.__main__ import main
from bench.float64 import WrongAnswerError
from bench.models import CELLS, write_model
from bench.running import CheckError, check_against
from bench.suite import BENCHMARKS
from tests.support.programs import ROOT, run_program


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of some benchmarks has written."""
    directory = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--seconds=0.03", "--turns=1", "--pairs=1", f"--json={directory}/bench.json"]
    run_program("python", "-m", "bench", *arguments, "--only=K1,W1,E2", "--hidden=256")
    document: dict[str, Any] = json.loads((directory / "bench.json").read_text())
    document["figures"] = sorted(path.name for path in directory.glob("*.svg"))
    return document


def test_every_benchmark_that_ran_has_rows_with_a_limit(results: dict[str, Any]) -> None:
    assert {row["id"] for row in results["rows"]} == {"K1", "W1", "E2"}
    for row in results["rows"]:
        assert row["ours"] > 0
        assert row["limit"] > 0
        assert row["checked"]


def test_every_cell_is_measured_beside_its_products_and_its_peers(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["id"] == "K1"]
    assert {row["what"].removesuffix(", deterministic") for row in rows} == set(CELLS)
    beside = {row["beside"] for row in rows if row["what"] == "gru"}
    assert beside == {
        "its weights read once",
        "its products by torch.mm",
        "torch's cell, one thread",
        "ONNX Runtime, one thread",
    }


def test_goals_are_those_of_each_size(results: dict[str, Any]) -> None:
    goals = {
        (row["size"]["H"], row["size"]["B"]): row["goal"]
        for row in results["rows"]
        if row["id"] == "K1" and row["what"] == "gru" and row["beside"].startswith("its ")
    }
    assert goals == {(256, 1): ">= 0.75", (256, 64): ">= 0.6"}


def test_the_machine_is_described_beside_the_rows(results: dict[str, Any]) -> None:
    machine = results["machine"]
    assert machine["echo_messages_per_second_256_streams"] > 0
    assert machine["mm_gflops_per_core"] > 1
    assert machine["cache_read_gbytes_per_second"] >= machine["memory_read_gbytes_per_second"] / 2


def test_plots_are_drawn_of_what_was_measured(results: dict[str, Any]) -> None:
    assert results["figures"] == ["cell-time.svg", "latency.svg"]


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--only", "K1,Z9"])
    assert raised.value.code == 2
    assert "no benchmark Z9" in capsys.readouterr().err


def test_help_lists_every_benchmark() -> None:
    listed = run_program("python", "-m", "bench", "--help")
    assert all(f"  {number}  {what}\n" in listed for number, (what, _) in BENCHMARKS.items())


def test_a_step_that_differs_from_float64_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_another(directory: Path, cell: str, hidden_size: int, **options: Any) -> Path:
        return write_model(directory, "gru_reset_after" if cell == "gru" else cell, hidden_size, **options)

    monkeypatch.setattr(cell_timing, "write_model", write_another)
    with pytest.raises(WrongAnswerError, match="differ from float64"):
        cell_timing.cell_step("gru", 16, 2, seconds=0.01, turns=1, num_threads=1)


def test_tokens_that_are_not_the_likeliest_fail_a_benchmark() -> None:
    best, leads = np.array([[1, 2]]), np.array([[0.5, 1e-6]])
    check_against(np.array([[1, 7]]), best, leads, "gru")  # the second two are as good as equal
    with pytest.raises(CheckError, match="1 of 2"):
        check_against(np.array([[3, 2]]), best, leads, "gru")


def test_the_table_in_the_notes_names_only_benchmarks_that_exist() -> None:
    notes = (ROOT / "bench" / "NOTES.md").read_text()
    named = {line.split("|")[1].strip() for line in notes.splitlines() if line.startswith("| ") and "|" in line[2:]}
    ids = {name.split()[0] for name in named if name and name[0].isupper() and name[1:2].isdigit()}
    assert ids
    assert ids <= set(BENCHMARKS)
