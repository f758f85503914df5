"""The one wheel holds the three packages, their types and the bundled weights, and nothing else."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.programs import ROOT

PACKAGES = {"cellserve", "cellserve_service", "cellserve_model"}
BUNDLED = "cellserve_model/models/pycode/1"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    completed = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def tracked(package: Path) -> set[str]:
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_three_packages_and_nothing_beside_them(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_every_file_of_the_packages_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    folders = [
        ROOT / "client" / "cellserve",
        ROOT / "service" / "cellserve_service",
        ROOT / "model" / "cellserve_model",
    ]
    assert set().union(*map(tracked, folders)) <= set(wheel.namelist())


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_each_package_says_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_the_bundled_model_is_in_the_wheel(wheel: zipfile.ZipFile, file: str) -> None:
    assert f"{BUNDLED}/{file}" in wheel.namelist()


def test_the_wheel_stays_small_enough_to_fetch(wheel: zipfile.ZipFile) -> None:
    assert sum(entry.compress_size for entry in wheel.infolist()) < 20_000_000


def test_the_package_alone_needs_neither_torch_nor_the_server(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
    alone = {Requirement(text).name for text in required if "extra ==" not in text}
    assert alone == {"grpcio", "protobuf", "googleapis-common-protos", "numpy"}
