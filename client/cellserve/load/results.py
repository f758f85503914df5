"""What came out of a load: how much was done, how long each request took, what was refused."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellserve.errors import CellserveError
from cellserve.load.mix import Work

__all__ = ["LoadResult", "Recorder"]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A load that has ended.

    seconds: from its begin to the last answer, at least as long as was asked for. num_tokens: in answered requests.
    latencies: of answered requests, in seconds, by the name of their kind; on a schedule from the time when each was
    due. send_lags: seconds by which this process itself was late to send, of requests that waited for nothing else.
    failures: by reason.
    """

    seconds: float
    num_tokens: int
    latencies: dict[str, npt.NDArray[np.float64]]
    send_lags: npt.NDArray[np.float64]
    failures: dict[str, int]

    @property
    def num_requests(self) -> int:
        """Answered ones."""
        return sum(map(len, self.latencies.values()))

    @property
    def num_failures(self) -> int:
        return sum(self.failures.values())

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.num_requests / self.seconds

    def quantile(self, fraction: float, name: str | None = None) -> float | None:
        """A latency in seconds of one kind of request, or of all; None where none was answered."""
        found = list(self.latencies.values()) if name is None else [self.latencies[name]]
        joined = np.concatenate(found) if found else np.empty(0)
        return float(np.quantile(joined, fraction)) if len(joined) else None

    def send_lag(self, fraction: float) -> float | None:
        return float(np.quantile(self.send_lags, fraction)) if len(self.send_lags) else None


class Recorder:
    """Takes what happens while a load runs."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_requests = 0
        self._latencies: dict[str, array[float]] = {}
        self._send_lags = array("d")
        self._failures: Counter[str] = Counter()

    def answered(self, work: Work, seconds: float) -> None:
        self.num_requests += 1
        self.num_tokens += work.num_tokens
        column = self._latencies.get(work.name)
        if column is None:
            column = self._latencies[work.name] = array("d")
        column.append(seconds)

    def failed(self, error: CellserveError) -> None:
        self._failures[error.reason or type(error).__name__] += 1

    def sent_late(self, seconds: float) -> None:
        self._send_lags.append(seconds)

    def result(self, seconds: float) -> LoadResult:
        return LoadResult(
            seconds=seconds,
            num_tokens=self.num_tokens,
            latencies={name: np.array(column) for name, column in sorted(self._latencies.items())},
            send_lags=np.array(self._send_lags),
            failures=dict(self._failures),
        )
