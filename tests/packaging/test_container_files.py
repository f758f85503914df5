"""The Dockerfile and the compose file say what they must; test_container.py builds and runs them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import ROOT, run_program

Service = dict[str, Any]

SERVERS = {"server", "server-gpu", "server-a", "server-b"}
# Nobody outside the compose network needs these.
NOT_PUBLISHED = {"server-a", "server-b", "redis"}
PROXIES = {"fleet": "envoy", "fleet-haproxy": "haproxy"}


def compose_services(*profiles: str) -> dict[str, Service]:
    """The services as Docker Compose understands the file, which needs no engine."""
    chosen = [option for profile in profiles for option in ("--profile", profile)]
    printed = run_program("docker-compose", *chosen, "config", "--format", "json", hint="make install")
    services: dict[str, Service] = json.loads(printed)["services"]
    return services


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    return compose_services("gpu", *PROXIES)


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    assert run_program("hadolint", "Dockerfile", hint="make install") == ""


@pytest.mark.parametrize("buildkit", ["--mount=", "<<EOF", "--link", "--chmod=", "# syntax="])
def test_the_dockerfile_builds_without_buildkit(buildkit: str) -> None:
    assert buildkit not in (ROOT / "Dockerfile").read_text()


def test_compose_starts_a_server_prometheus_and_grafana() -> None:
    assert set(compose_services()) == {"server", "prometheus", "grafana"}


def test_the_gpu_profile_adds_a_server_that_reserves_a_device(services: dict[str, Service]) -> None:
    assert set(compose_services("gpu")) == {"server", "server-gpu", "prometheus", "grafana"}
    (device,) = services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["server-gpu"]["environment"]["CELLSERVE_DEVICE"] == "cuda"
    assert "deploy" not in services["server"]


@pytest.mark.parametrize("profile", PROXIES)
def test_a_fleet_is_two_replicas_with_one_redis_behind_a_proxy(profile: str) -> None:
    services = compose_services(profile)
    assert set(services) == {"server", "server-a", "server-b", "redis", PROXIES[profile], "prometheus", "grafana"}
    for name in ("server-a", "server-b"):
        assert services[name]["environment"]["CELLSERVE_STORE"] == "redis://redis:6379/0"
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert set(services[PROXIES[profile]]["depends_on"]) == {"server-a", "server-b"}
    assert [port["target"] for port in services[PROXIES[profile]]["ports"]] == [50050]


def test_redis_keeps_what_it_was_given(services: dict[str, Service]) -> None:
    assert " ".join(services["redis"]["command"]).endswith("--appendonly yes --appendfsync everysec")
    (volume,) = services["redis"]["volumes"]
    assert (volume["type"], volume["target"]) == ("volume", "/data")


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_the_sessions_of_a_lone_server_outlive_its_container(services: dict[str, Service], name: str) -> None:
    assert services[name]["environment"]["CELLSERVE_STORE"] == "sqlite:////data/sessions.db"
    (volume,) = services[name]["volumes"]
    assert (volume["type"], volume["target"]) == ("volume", "/data")


def test_no_two_servers_share_a_volume(services: dict[str, Service]) -> None:
    sources = [volume["source"] for name in SERVERS for volume in services[name].get("volumes", [])]
    assert len(sources) == len(set(sources))


@pytest.mark.parametrize("name", [*sorted(SERVERS), *PROXIES.values(), "redis", "prometheus", "grafana"])
def test_no_container_can_write_to_its_root_gain_rights_or_be_reached_from_outside(
    services: dict[str, Service], name: str
) -> None:
    service = services[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    ports = service.get("ports", [])
    assert bool(ports) == (name not in NOT_PUBLISHED)
    assert all(port["host_ip"] == "127.0.0.1" for port in ports)


@pytest.mark.parametrize("name", sorted(SERVERS))
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
