"""The Dockerfile and the compose file say what they must; test_container.py builds and runs them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import ROOT, run_program

Service = dict[str, Any]


def compose_services(*profiles: str) -> dict[str, Service]:
    """The services as Docker Compose understands the file, which needs no engine."""
    chosen = [option for profile in profiles for option in ("--profile", profile)]
    printed = run_program("docker-compose", *chosen, "config", "--format", "json", hint="make install")
    services: dict[str, Service] = json.loads(printed)["services"]
    return services


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    return compose_services("gpu")


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    assert run_program("hadolint", "Dockerfile", hint="make install") == ""


@pytest.mark.parametrize("buildkit", ["--mount=", "<<EOF", "--link", "--chmod=", "# syntax="])
def test_the_dockerfile_builds_without_buildkit(buildkit: str) -> None:
    assert buildkit not in (ROOT / "Dockerfile").read_text()


def test_compose_starts_a_server_prometheus_and_grafana() -> None:
    assert set(compose_services()) == {"server", "prometheus", "grafana"}


def test_the_gpu_profile_adds_a_server_that_reserves_a_device(services: dict[str, Service]) -> None:
    assert set(services) == {"server", "server-gpu", "prometheus", "grafana"}
    (device,) = services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["server-gpu"]["environment"]["CELLSERVE_DEVICE"] == "cuda"
    assert "deploy" not in services["server"]


@pytest.mark.parametrize("name", ["server", "server-gpu", "prometheus", "grafana"])
def test_no_container_can_write_to_its_root_gain_rights_or_be_reached_from_outside(
    services: dict[str, Service], name: str
) -> None:
    service = services[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"]
    assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_a_server_has_longer_to_stop_than_to_drain(services: dict[str, Service], name: str) -> None:
    drain = int(services[name]["environment"]["CELLSERVE_DRAIN_TIMEOUT_SECONDS"])
    assert int(services[name]["stop_grace_period"].removesuffix("s")) > drain


def test_grafana_waits_for_a_healthy_prometheus(services: dict[str, Service]) -> None:
    assert services["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"
    assert services["prometheus"]["healthcheck"]["test"]


def test_no_image_is_taken_at_its_newest(services: dict[str, Service]) -> None:
    assert all(":" in service["image"] for service in services.values() if "build" not in service)


def test_the_files_that_compose_mounts_are_there(services: dict[str, Service]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    sources = [mount["source"] for mount in mounts if mount["type"] == "bind"]
    assert sources
    assert all(Path(source).is_dir() for source in sources)
