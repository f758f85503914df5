"""Reads a server's Prometheus endpoint: what it counts at a moment, and what happened between two moments."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from cellserve.cli.problems import CommandError

__all__ = ["Histogram", "MetricsError", "Snapshot", "parse_metrics", "read_metrics"]

_TIMEOUT_SECONDS: Final = 5.0


class MetricsError(CommandError):
    """The endpoint does not answer, or answers with something that is not Prometheus text."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values counted by upper bound.

    bounds: ascending, the last one infinite. counts: how many values are at most the bound beside. total: the
    sum of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def since(self, earlier: Histogram) -> Histogram:
        """The values counted after an earlier reading; all of them where the server was restarted between."""
        if earlier.bounds != self.bounds or earlier.count > self.count:
            return self
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - earlier.total)

    def quantile(self, fraction: float) -> float | None:
        """The value below which a fraction lies, interpolated inside its bucket as Prometheus does.

        None when nothing was counted; the last finite bound for what lies above it.
        """
        if not self.count:
            return None
        rank = fraction * self.count
        lower_bound, lower_count = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= rank and count > lower_count:
                if bound == float("inf"):
                    return lower_bound
                return lower_bound + (bound - lower_bound) * (rank - lower_count) / (count - lower_count)
            lower_bound, lower_count = bound, count
        raise AssertionError("the last bucket counts every value")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All series of an endpoint at one moment. at_seconds: of the monotonic clock."""

    at_seconds: float
    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def total(self, name: str, **labels: str) -> float:
        """The sum over the series of this name that carry these labels; 0 when there is none."""
        return sum(value for _, value in self._series(name, labels))

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The sums over the series of this name, by the value of one label."""
        sums: dict[str, float] = {}
        for found, value in self._series(name, labels):
            key = found.get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram of this name, summed over all series that carry these labels."""
        by_bound = {float(bound): count for bound, count in self.by_label(f"{name}_bucket", "le", **labels).items()}
        bounds = tuple(sorted(by_bound))
        return Histogram(bounds, tuple(by_bound[bound] for bound in bounds), self.total(f"{name}_sum", **labels))

    def _series(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        wanted = labels.items()
        for (series_name, series_labels), value in self.values.items():
            if series_name == name and wanted <= series_labels:
                yield dict(series_labels), value


def read_metrics(url: str) -> Snapshot:
    """Read the endpoint once. Raises MetricsError."""
    if not url.startswith(("http://", "https://")):
        raise MetricsError(f"{url!r} is no http address")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310 - checked above
            text = response.read().decode()
    except (OSError, ValueError) as error:
        raise MetricsError(f"no metrics at {url}: {_cause(error)}") from None
    return parse_metrics(text, at_seconds=time.monotonic(), source=url)


def parse_metrics(text: str, *, at_seconds: float, source: str = "the endpoint") -> Snapshot:
    """Parse Prometheus text. Raises MetricsError."""
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name, frozenset(sample.labels.items())] = sample.value
    except ValueError:
        raise MetricsError(f"what {source} answers is not Prometheus text") from None
    return Snapshot(at_seconds, values)


def _cause(error: OSError | ValueError) -> object:
    return error.reason if isinstance(error, urllib.error.URLError) and error.reason else error
