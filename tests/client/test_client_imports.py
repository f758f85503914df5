"""`import cellserve` alone is cheap, and its names are there when they are asked for."""

import subprocess
import sys

import pytest

import cellserve


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_imports_no_grpc_protobuf_or_numpy() -> None:
    modules = modules_after("import cellserve")
    assert not modules & {"grpc", "google.protobuf", "numpy", "cellserve.v1"}


def test_importing_the_exceptions_imports_no_grpc() -> None:
    assert "grpc" not in modules_after("from cellserve import CellserveError; import cellserve.errors")


def test_importing_the_client_imports_no_torch_and_nothing_of_the_server() -> None:
    modules = modules_after("from cellserve import AsyncClient, Client")
    assert "grpc" in modules
    assert not {name.partition(".")[0] for name in modules} & {"torch", "cellserve_model", "cellserve_service"}


def test_every_public_name_can_be_had_and_is_listed() -> None:
    for name in cellserve.__all__:
        assert getattr(cellserve, name).__name__ == name
    assert set(cellserve.__all__) <= set(dir(cellserve))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        cellserve.Klient  # noqa: B018
