"""Prometheus takes its configuration, and the dashboard asks only for what the server publishes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.programs import ROOT, run_program
from tests.support.server import ServerProcess

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(path: Path) -> list[str]:
    dashboard = json.loads(path.read_text())
    return [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:cellserve|grpc_server)_[a-z_]+", query))


@pytest.fixture(scope="module")
def published(server: ServerProcess) -> set[str]:
    """Names of the series that a server exports."""
    names: set[str] = set()
    for family in text_string_to_metric_families(server.metrics()):
        names.update(family.name + suffix for suffix in SUFFIXES.get(family.type, ("",)))
    return names


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_only_for_metrics_that_the_server_exports(path: Path, published: set[str]) -> None:
    asked = set().union(*map(metrics_in, queries(path)))
    assert asked
    assert asked - published == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_promtool_can_parse_every_query_of_a_dashboard(path: Path, tmp_path: Path) -> None:
    rules = [
        {
            "record": f"panel:{number}",
            "expr": query.replace("$__rate_interval", "1m").replace("$instance", ".*"),
        }
        for number, query in enumerate(queries(path))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": path.stem, "rules": rules}]}))
    run_program("promtool", "check", "rules", file)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_no_two_panels_share_an_id_or_a_place(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert len({panel["id"] for panel in panels(dashboard)}) == len(list(panels(dashboard)))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))


def test_prometheus_takes_its_configuration() -> None:
    file = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    run_program("promtool", "check", "config", file)


def test_grafana_reads_the_dashboards_and_the_prometheus_that_compose_starts() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "cellserve.yml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    mounted = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounted


def test_the_alerts_fire_when_they_should_and_ask_only_for_metrics_that_the_server_exports(published: set[str]) -> None:
    run_program("promtool", "test", "rules", ROOT / "tests" / "packaging" / "alerts_test.yml")
    asked = metrics_in((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert asked
    assert asked - published == set()
