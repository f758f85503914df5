"""The stubs are what protos/ gives, and load with any protobuf and grpcio that a client may have."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.programs import ROOT, refuse, run_program

STUBS = ROOT / "client" / "cellserve" / "v1"

ROUND_TRIP = """
import importlib, pathlib, sys
packages, client = sys.argv[1:]
sys.path[:0] = [packages, client]

import google.protobuf, grpc
stubs = sorted(path.stem for path in pathlib.Path(client, "cellserve", "v1").glob("*_pb2*.py"))
modules = {name: importlib.import_module("cellserve.v1." + name) for name in stubs}
print(google.protobuf.__version__, grpc.__version__, *stubs)

assert grpc.__file__.startswith(packages) and google.protobuf.__file__.startswith(packages)
session = modules["session_service_pb2"].Session(id="editor-42", model="pycode", position=2**40)
assert modules["session_service_pb2"].Session.FromString(session.SerializeToString()) == session
with grpc.insecure_channel("localhost:1") as channel:
    assert modules["session_service_pb2_grpc"].SessionServiceStub(channel).Stream
"""


def generated(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if "_pb2" in path.name}


def test_the_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    # -o: the environment that runs this test is taken as it is.
    run_program("make", "-o", ".venv/.installed", "protos", f"STUBS={tmp_path}")
    assert generated(tmp_path / "cellserve" / "v1") == generated(STUBS), "run `make protos`"


def test_only_services_have_service_stubs() -> None:
    services = {path.stem for path in (ROOT / "protos").rglob("*.proto") if path.stem.endswith("_service")}
    assert {path.name.removesuffix("_pb2_grpc.py") for path in STUBS.glob("*_pb2_grpc.py")} == services


@pytest.fixture(scope="module")
def bounds() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    return {requirement.name: requirement for requirement in requirements}


def import_stubs(end: str) -> tuple[Version, Version]:
    """Imports every stub with one end's packages alone; gives the versions of protobuf and grpcio there."""
    packages = ROOT / ".venv" / end
    if not packages.is_dir():
        refuse(f"{packages.relative_to(ROOT)} is not there (make install)")
    completed = subprocess.run(
        # -S: nothing of the virtual environment, only the end's own packages.
        [sys.executable, "-I", "-S", "-c", ROUND_TRIP, packages, ROOT / "client"],
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    protobuf, grpcio, *stubs = completed.stdout.split()
    assert len(stubs) == len(list(STUBS.glob("*_pb2*.py")))
    return Version(protobuf), Version(grpcio)


def oldest(requirement: Requirement) -> Version:
    return next(Version(bound.version) for bound in requirement.specifier if bound.operator == ">=")


def test_the_stubs_load_with_the_oldest_versions_that_the_package_allows(
    bounds: dict[str, Requirement],
) -> None:
    protobuf, grpcio = import_stubs("oldest-protobuf")
    assert protobuf == oldest(bounds["protobuf"])
    assert grpcio == oldest(bounds["grpcio"])


def test_the_stubs_load_with_the_newest_protobuf_and_grpcio(bounds: dict[str, Requirement]) -> None:
    protobuf, grpcio = import_stubs("newest-protobuf")
    assert protobuf in bounds["protobuf"].specifier
    assert protobuf.major == 7
    assert grpcio in bounds["grpcio"].specifier


def test_buf_finds_no_fault_with_the_contract() -> None:
    assert run_program("buf", "lint", "protos") == ""
