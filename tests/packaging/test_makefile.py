"""The Makefile is the list of chores: bare `make` prints it."""

import pytest

from tests.support.programs import ROOT, run_program

TARGETS = [
    "install",
    "protos",
    "format",
    "check",
    "test",
    "demo",
    "serve",
    "train",
    "bench",
    "bench-gpu",
    "system-deps",
    "test-gpu",
    "test-workers",
    "chaos",
    "image",
]


@pytest.fixture(scope="module")
def descriptions() -> dict[str, str]:
    lines = run_program("make", "--no-print-directory").splitlines()
    assert all(line.startswith("make ") for line in lines)
    return {line.split()[1]: " ".join(line.split()[2:]) for line in lines}


@pytest.mark.parametrize("target", TARGETS)
def test_bare_make_prints_each_target_with_what_it_does(descriptions: dict[str, str], target: str) -> None:
    assert descriptions[target]


def test_bare_make_changes_nothing() -> None:
    assert run_program("make", "--dry-run") == run_program("make", "--dry-run", "help")


def test_ci_runs_only_make_targets(descriptions: dict[str, str]) -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith(("#", "set -euo pipefail", "cd "))
    ]
    assert commands
    for command in commands:
        program, target = command.split()
        assert program == "make"
        assert target in descriptions
