"""constraints.txt pins what the project is tested with, whole and for every machine."""

import tomllib
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.programs import ROOT

NOT_PINNED = Version("0")  # no requirement allows it


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and "@" not in line and "/" not in line for line in lines)
    named = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in named}


def required_packages() -> set[str]:
    """Every distribution that cellserve[dev] needs here, straight or through another."""
    environment = {name: str(value) for name, value in default_environment().items()}
    found: set[str] = set()
    waiting = [Requirement("cellserve[dev]")]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        extras = requirement.extras or {""}
        for text in metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({**environment, "extra": e}) for e in extras):
                waiting.append(needed)
    return found - {"cellserve"}


def test_every_package_that_the_project_needs_is_pinned_to_the_version_tested(
    pins: dict[str, Version],
) -> None:
    tested = {name: Version(Version(metadata.version(name)).public) for name in required_packages()}
    assert {name: version for name, version in tested.items() if pins.get(name) != version} == {}


def test_nothing_else_is_pinned(pins: dict[str, Version]) -> None:
    assert set(pins) - required_packages() == set()


def test_a_pin_is_a_public_version_so_that_a_cpu_and_a_cuda_build_fit_it(pins: dict[str, Version]) -> None:
    assert [name for name, version in pins.items() if version.local] == []


def test_every_pin_is_within_what_the_package_allows(pins: dict[str, Version]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    outside = [
        str(requirement)
        for requirement in requirements
        if requirement.name != "cellserve"
        and pins.get(canonicalize_name(requirement.name), NOT_PINNED) not in requirement.specifier
    ]
    assert outside == []
