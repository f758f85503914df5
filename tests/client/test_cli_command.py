"""The entry of the `cellserve` command: its help, and what it says where packages of the extra are missing."""

import subprocess
import sys

import pytest

from cellserve.cli.app import run


@pytest.mark.parametrize("package", ["typer", "rich", "prometheus_client"])
def test_where_a_package_is_missing_one_line_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from cellserve._command import main; main()"
    finished = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == f"cellserve needs {package}, which is not installed: pip install 'cellserve[cli]'\n"


def test_the_entry_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, cellserve._command; sys.exit(bool({'grpc', 'typer', 'rich', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_subcommand_the_help_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capfd.readouterr().out
    for word in ("models", "sessions", "step", "score", "generate", "top", "--server", "CELLSERVE_SERVER"):
        assert word in shown


@pytest.mark.parametrize("command", ["models", "sessions", "step", "score", "generate", "top"])
def test_every_subcommand_documents_its_json(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    shown = capfd.readouterr().out
    assert "JSON: " in shown
    assert "--json" in shown
