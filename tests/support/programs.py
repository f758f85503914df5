"""Finds the programs outside Python that some tests use, and says how to get them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]


def require_program(name: str, *, hint: str = "make system-deps") -> Path:
    """Path of a program; where it is absent the test is skipped by its name, and fails where CI=true."""
    found = find_program(name)
    if found is None:
        refuse(f"{name} is not on this machine ({hint})")
    return found


def run_program(name: str, *arguments: str | Path, hint: str = "make system-deps") -> str:
    """Runs a program in the checkout's root and gives its standard output; a failure shows what it said."""
    command = [require_program(name, hint=hint), *arguments]
    completed = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def find_program(name: str) -> Path | None:
    """Looks in the virtual environment, in what npm installed for the tests, and on PATH."""
    folders = [
        str(Path(sys.executable).parent),
        str(ROOT / "tests" / "node" / "node_modules" / ".bin"),
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",  # not on the PATH of everyone who may run what is there
        "/sbin",
    ]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return None if found is None else Path(found)


def refuse(reason: str) -> NoReturn:
    """Skips the test, or fails it where CI=true: there, everything that a test needs has to be present."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _environment() -> dict[str, str]:
    # A make that runs the tests hands its own flags to every make below it.
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
