"""What the engine and the servicers count, as data; metrics.py exports it."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve_service.errors import Refusal, reason_name

# Arrays, or values, that a histogram lays by.
_MOST_NEW = 64


def seconds_bounds(first: float = 50e-6, last: float = 60.0, ratio: float = 1.5) -> NDArray[np.float64]:
    """Upper bounds of a histogram of durations: geometric, from 50 us on."""
    number = int(np.ceil(np.log(last / first) / np.log(ratio))) + 1
    return np.array([float(f"{first * ratio**i:.3g}") for i in range(number)])


class Histogram:
    """Counts of values by upper bound.

    Values are laid by as they come, and counted many at a time: one thread observes, any thread may read.
    """

    def __init__(self, bounds: NDArray[np.float64]) -> None:
        self.bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)  # the last one: above every bound
        self._total = 0.0
        self._new: deque[NDArray[np.float64]] = deque()
        self._new_ones: deque[float] = deque()
        self._counting = Lock()

    def observe(self, values: NDArray[np.float64]) -> None:
        """Count values, (n,). The array is kept for a while."""
        self._new.append(values)
        if len(self._new) >= _MOST_NEW:
            self._count()

    def observe_one(self, value: float) -> None:
        self._new_ones.append(value)
        if len(self._new_ones) >= _MOST_NEW:
            self._count()

    def read(self) -> tuple[NDArray[np.int64], float]:
        """How many values are at most each bound and above the one before, those above all of them last; their sum."""
        self._count()
        with self._counting:
            return self._counts, self._total

    def add(self, other: "Histogram") -> None:
        """Count what another one has counted, whose bounds are the same."""
        counts, total = other.read()
        with self._counting:
            self._counts = self._counts + counts
            self._total += total

    def __getstate__(self) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
        return self.bounds, *self.read()

    def __setstate__(self, state: tuple[NDArray[np.float64], NDArray[np.int64], float]) -> None:
        self.__init__(state[0])  # type: ignore[misc]
        _, self._counts, self._total = state

    def _count(self) -> None:
        with self._counting:
            new = [self._new.popleft() for _ in range(len(self._new))]
            new.append(np.array([self._new_ones.popleft() for _ in range(len(self._new_ones))], np.float64))
            values = np.concatenate(new)
            # Not in place: what came from another process cannot be written to.
            self._counts = self._counts + np.bincount(self.bounds.searchsorted(values), minlength=len(self._counts))
            self._total += float(values.sum())


class TickResult(Protocol):
    """What every tick's result tells of its cost."""

    @property
    def num_padding_rows(self) -> int: ...
    @property
    def compute_seconds(self) -> float: ...


def _durations() -> Histogram:
    return Histogram(seconds_bounds())


@dataclass(slots=True)
class ModelStatistics:
    """Counts of one model."""

    steps_run: int = 0
    steps_generated: int = 0
    sessions_opened: int = 0
    padding_rows: int = 0
    step_queue: Histogram = field(default_factory=_durations)
    tick_duration: Histogram = field(default_factory=_durations)
    tick_compute: Histogram = field(default_factory=_durations)
    inter_token: Histogram = field(default_factory=_durations)
    batch_size: Histogram = field(
        default_factory=lambda: Histogram(np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384.0]))
    )

    def count_tick(self, result: TickResult, seconds: float) -> None:
        """A tick that came back after some seconds."""
        self.padding_rows += result.num_padding_rows
        self.tick_compute.observe_one(result.compute_seconds)
        self.tick_duration.observe_one(seconds)


@dataclass(slots=True)
class Statistics:
    """Counts of the engine and its store."""

    models: list[ModelStatistics] = field(default_factory=list)
    sessions_closed: Counter[str] = field(default_factory=Counter)
    sessions_rejected: Counter[str] = field(default_factory=Counter)
    run_failures: Counter[str] = field(default_factory=Counter)
    runs_deduplicated: int = 0
    session_lifetime: Histogram = field(
        default_factory=lambda: Histogram(seconds_bounds(first=0.01, last=1e6, ratio=2.0))
    )
    checkpoint_duration: Histogram = field(default_factory=_durations)
    store_errors: int = 0

    def count_failures(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self.run_failures[reason_name(refusal.reason)] += 1


@dataclass(slots=True)
class CallCounts:
    """Counts of one method's calls."""

    started: int = 0
    handled: Counter[str] = field(default_factory=Counter)  # by status code
    handling_seconds: Histogram = field(default_factory=_durations)

    def add(self, other: "CallCounts") -> None:
        self.started += other.started
        self.handled.update(dict(other.handled))
        self.handling_seconds.add(other.handling_seconds)


# What kind of call, service, method.
CallLabels = tuple[str, str, str]


@dataclass(slots=True)
class FrontStatistics:
    """Counts of one front end, or of several together."""

    streams: int = 0
    stream_unsent_bytes: int = 0
    event_loop_lag: Histogram = field(default_factory=_durations)
    run_failures: Counter[str] = field(default_factory=Counter)
    step_durations: dict[int, Histogram] = field(default_factory=lambda: defaultdict(_durations))  # by model
    calls: dict[CallLabels, CallCounts] = field(default_factory=lambda: defaultdict(CallCounts))

    def count_failures(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self.run_failures[reason_name(refusal.reason)] += 1

    def add(self, other: "FrontStatistics") -> None:
        """Count what another one has counted; it may be counting on meanwhile."""
        self.streams += other.streams
        self.stream_unsent_bytes += other.stream_unsent_bytes
        self.event_loop_lag.add(other.event_loop_lag)
        self.run_failures.update(dict(other.run_failures))
        for model, durations in list(other.step_durations.items()):
            self.step_durations[model].add(durations)
        for labels, counts in list(other.calls.items()):
            self.calls[labels].add(counts)
