"""Reads a server's Prometheus endpoint, and how far counters have come since an earlier look."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import ServerProcess

__all__ = ["Metrics"]

WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Metrics:
    """One look at the endpoint."""

    families: dict[str, Metric]
    _values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, server: ServerProcess) -> Metrics:
        families = {family.name: family for family in text_string_to_metric_families(server.metrics())}
        values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        return cls(families, values)

    @classmethod
    def wait(
        cls, server: ServerProcess, condition: Callable[[Metrics], bool], timeout_seconds: float = 20.0
    ) -> Metrics:
        """Look again and again until the condition holds."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            metrics = cls.of(server)
            if condition(metrics):
                return metrics
            assert time.monotonic() < deadline, "the metrics did not come to this"

    def value(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where there is none yet."""
        return self._values.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels, beside others."""
        wanted = labels.items()
        return sum(value for (other, found), value in self._values.items() if other == name and wanted <= found)

    def since(self, earlier: Metrics, name: str, **labels: str) -> float:
        """How far a counter has come."""
        return self.value(name, **labels) - earlier.value(name, **labels)
