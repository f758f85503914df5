"""The import rules between the three packages, held on every import that is written anywhere in them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import ROOT

PACKAGES = {
    "cellserve": ROOT / "client" / "cellserve",
    "cellserve_service": ROOT / "service" / "cellserve_service",
    "cellserve_model": ROOT / "model" / "cellserve_model",
}


def written_imports(path: Path) -> Iterator[str]:
    """Dotted names of what a module imports anywhere in it, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def importers(package: str, *forbidden: str) -> set[str]:
    """The modules of a package that import any of the forbidden ones, or something in them."""
    folder = PACKAGES[package]
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for name in written_imports(path)
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    }


def test_the_model_package_knows_neither_grpc_nor_the_service() -> None:
    assert not importers("cellserve_model", "grpc", "grpc_status", "cellserve_service", "cellserve")


def test_only_the_model_package_imports_torch() -> None:
    assert importers("cellserve_model", "torch")
    assert not importers("cellserve_service", "torch")
    assert not importers("cellserve", "torch")


def test_the_service_takes_only_the_contract_from_the_client_package() -> None:
    folder = PACKAGES["cellserve_service"]
    taken = {
        name for path in folder.rglob("*.py") for name in written_imports(path) if name.split(".")[0] == "cellserve"
    }
    # The stubs, and the same messages with columns as bytes.
    assert all(name == "cellserve.v1" or name.startswith(("cellserve.v1.", "cellserve.columns.")) for name in taken)


def test_only_the_composition_root_of_the_service_imports_the_model_package() -> None:
    assert len(importers("cellserve_service", "cellserve_model")) == 1


@pytest.mark.parametrize("module", ["torch", "cellserve_model", "cellserve_service.engine"])
def test_a_front_end_process_loads_neither_model_nor_engine(module: str) -> None:
    code = f"import sys, cellserve_service.worker; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_client_package_imports_neither_of_the_others() -> None:
    assert not importers("cellserve", "cellserve_service", "cellserve_model")


@pytest.mark.parametrize("module", ["grpc", "numpy", "torch", "google.protobuf"])
def test_importing_the_client_package_loads_nothing_until_it_is_asked_for(module: str) -> None:
    code = f"import sys, cellserve; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_contract_can_be_used_without_numpy() -> None:
    code = "import sys, cellserve.v1.session_service_pb2_grpc; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tests_for_a_gpu_run_where_only_torch_triton_numpy_safetensors_and_pytest_are() -> None:
    marked = [path for path in (ROOT / "tests" / "model").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    waiting = [*marked, ROOT / "tests" / "conftest.py", ROOT / "tests" / "model" / "conftest.py"]
    needed: set[str] = set()
    for path in waiting:  # grows while it is read
        for name in written_imports(path):
            package = name.split(".")[0]
            if package == "tests":
                helper = ROOT.joinpath(*name.split(".")[:3]).with_suffix(".py")
                if helper not in waiting:
                    waiting.append(helper)
            elif package not in sys.stdlib_module_names:
                needed.add(package)
    assert needed <= {"torch", "triton", "numpy", "safetensors", "pytest", "cellserve_model"}


def test_the_benchmark_for_a_gpu_needs_none_of_the_service_s_packages() -> None:
    absent = ["grpc", "google.protobuf", "cellserve", "cellserve_service", "pydantic", "rich", "typer", "structlog"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import bench.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
