"""Exports what was counted to Prometheus: reads the engine's arrays at scrape time, on the metrics server's thread."""

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cellserve_service.core import Core
from cellserve_service.statistics import FrontStatistics, Histogram, ModelStatistics, Statistics

_PREFIX = "cellserve_"


class ServerCollector(Collector):
    """Sessions, steps, ticks, streams and calls.

    `of_fronts` gives what the front ends have counted together, `core` the engine's state once there is one.
    """

    def __init__(
        self, statistics: Statistics, of_fronts: Callable[[], FrontStatistics], core: Callable[[], Core | None]
    ) -> None:
        self._statistics = statistics
        self._of_fronts = of_fronts
        self._core = core

    def collect(self) -> Iterator[Metric]:
        versions = (version("cellserve"), platform.python_version(), version("grpcio"))
        yield _gauge(
            "build_info",
            "Constant 1; versions are in the labels.",
            [(versions, 1)],
            ("version", "python", "grpcio"),
        )
        fronts = self._of_fronts()
        yield from _of_streams(fronts)
        yield from _of_calls(fronts)
        core = self._core()
        if core is not None:
            yield from self._of_sessions(core, fronts)
            yield from self._of_models(core, fronts)

    def _of_sessions(self, core: Core, fronts: FrontStatistics) -> Iterator[Metric]:
        statistics, sessions = self._statistics, core.sessions
        tiers: list[tuple[tuple[str, ...], float]] = []
        state_bytes: list[tuple[tuple[str, ...], float]] = []
        for served in core.served:
            num_open = int(np.count_nonzero(sessions.is_open & (sessions.model == served.index)))
            resident = served.slots.num_resident
            stored = int(np.count_nonzero(sessions.is_in_store & (sessions.model == served.index)))
            row_bytes = 4 * served.info.num_layers * served.info.state_size
            for tier, number in (("device", resident), ("host", num_open - resident - stored), ("store", stored)):
                labels = (served.info.name, tier)
                tiers.append((labels, number))
                state_bytes.append((labels, number * row_bytes))
        yield _gauge("sessions", "Open sessions, by where their state is.", tiers, ("model", "tier"))
        yield _gauge("state_bytes", "Bytes of sessions' states.", state_bytes, ("model", "tier"))
        yield _gauge("session_capacity", "Sessions that can be open.", [((), sessions.capacity)])
        yield _counter("sessions_closed", "Sessions that ended.", statistics.sessions_closed.items(), ("reason",))
        yield _counter(
            "sessions_rejected", "Opens that were refused.", statistics.sessions_rejected.items(), ("reason",)
        )
        yield _histogram(
            "session_lifetime_seconds",
            "Age of sessions when they ended.",
            [((), statistics.session_lifetime)],
        )
        run_failures = Counter(dict(statistics.run_failures))
        run_failures.update(fronts.run_failures)
        yield _counter(
            "run_failures",
            "Requests that were refused or withdrawn.",
            run_failures.items(),
            ("reason",),
        )
        yield _counter(
            "runs_deduplicated",
            "Repeats answered without running again.",
            [((), statistics.runs_deduplicated)],
        )
        yield _gauge("steps_pending", "Tokens accepted and not yet run.", [((), core.num_pending_tokens)])
        yield from self._of_store(core)
        held = 4 * sum(served.runs.held_pool.num_live for served in core.served)
        yield _gauge("held_answer_bytes", "Bytes of answers held for repeats.", [((), held)])

    def _of_store(self, core: Core) -> Iterator[Metric]:
        statistics, keeping = self._statistics, core.keeping
        yield _histogram(
            "checkpoint_duration_seconds",
            "From copying sessions to their rows being safe in the state store.",
            [((), statistics.checkpoint_duration)],
        )
        lag = 0.0 if keeping is None else keeping.lag_seconds(time.monotonic())
        yield _gauge("checkpoint_lag_seconds", "Age of the oldest change that is not safe in the store.", [((), lag)])
        yield _counter("store_errors", "Batches that the state store did not take.", [((), statistics.store_errors)])
        fenced = 0 if keeping is None else keeping.num_fenced
        yield _counter("fenced_writes", "Writes refused because another server has the session.", [((), fenced)])

    def _of_models(self, core: Core, fronts: FrontStatistics) -> Iterator[Metric]:
        names = [(served.info.name,) for served in core.served]
        models = self._statistics.models

        def counts(of: Callable[[ModelStatistics], float]) -> list[tuple[tuple[str, ...], float]]:
            return [(name, of(model)) for name, model in zip(names, models, strict=True)]

        def histograms(of: Callable[[ModelStatistics], Histogram]) -> list[tuple[tuple[str, ...], Histogram]]:
            return [(name, of(model)) for name, model in zip(names, models, strict=True)]

        label = ("model",)
        infos = [
            ((served.info.name, str(served.info.version), served.info.cell, served.info.device), 1.0)
            for served in core.served
        ]
        yield _gauge(
            "model_info",
            "Constant 1; the model is in the labels.",
            infos,
            ("model", "version", "cell", "device"),
        )
        steps = [((*name, "run"), float(m.steps_run)) for name, m in zip(names, models, strict=True)]
        steps += [((*name, "generate"), float(m.steps_generated)) for name, m in zip(names, models, strict=True)]
        yield _counter("steps", "Tokens consumed.", steps, ("model", "kind"))
        yield _counter("sessions_opened", "Sessions created.", counts(lambda m: m.sessions_opened), label)
        yield _counter("batch_padding_rows", "Rows stepped for padding.", counts(lambda m: m.padding_rows), label)
        parked = [((served.info.name,), float(served.slots.num_parked)) for served in core.served]
        yield _counter("parked", "States moved from the device to host memory.", parked, label)
        unparked = [((served.info.name,), float(served.slots.num_unparked)) for served in core.served]
        yield _counter("unparked", "States moved back to the device.", unparked, label)
        fetched = [((served.info.name,), float(served.slots.num_fetched)) for served in core.served]
        yield _counter("fetched", "States that came back from the state store.", fetched, label)
        durations = [((served.info.name,), fronts.step_durations[served.index]) for served in core.served]
        yield _histogram(
            "step_duration_seconds", "From a run's acceptance to its answer written.", durations, ("model",)
        )
        for name, help_text, of in _MODEL_HISTOGRAMS:
            yield _histogram(name, help_text, histograms(of), label)


_MODEL_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], Histogram]], ...] = (
    ("step_queue_seconds", "From a run's acceptance to its first tick.", lambda m: m.step_queue),
    (
        "tick_duration_seconds",
        "From a tick's choice of sessions to their answers.",
        lambda m: m.tick_duration,
    ),
    ("tick_compute_seconds", "What the stepper took of a tick.", lambda m: m.tick_compute),
    ("inter_token_seconds", "Between the tokens of a generate.", lambda m: m.inter_token),
    ("batch_size", "Sessions in a tick.", lambda m: m.batch_size),
)


def _of_streams(fronts: FrontStatistics) -> Iterator[Metric]:
    yield _gauge("streams", "Open streams.", [((), fronts.streams)])
    yield _gauge(
        "stream_unsent_bytes",
        "Bytes of answers that wait for slow readers.",
        [((), fronts.stream_unsent_bytes)],
    )
    yield _histogram(
        "event_loop_lag_seconds",
        "How late the event loops ran a timer.",
        [((), fronts.event_loop_lag)],
    )


def _of_calls(fronts: FrontStatistics) -> Iterator[Metric]:
    """The usual counts of gRPC calls, under the names that public dashboards know."""
    labels = ("grpc_type", "grpc_service", "grpc_method")
    calls = fronts.calls.items()
    started = [(of, float(counts.started)) for of, counts in calls]
    yield _counter("grpc_server_started", "Calls that began.", started, labels, prefix="")
    handled = [((*of, code), float(number)) for of, counts in calls for code, number in counts.handled.items()]
    yield _counter(
        "grpc_server_handled", "Calls that ended, by status code.", handled, (*labels, "grpc_code"), prefix=""
    )
    seconds = [(of, counts.handling_seconds) for of, counts in calls]
    yield _histogram("grpc_server_handling_seconds", "How long calls lasted.", seconds, labels, prefix="")


def _gauge(
    name: str,
    help_text: str,
    samples: Iterable[tuple[tuple[str, ...], float]],
    labels: Sequence[str] = (),
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{_PREFIX}{name}", help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(
    name: str,
    help_text: str,
    samples: Iterable[tuple[tuple[str, ...] | str, float]],
    labels: Sequence[str] = (),
    prefix: str = _PREFIX,
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{prefix}{name}", help_text, labels=labels)
    for values, value in samples:
        family.add_metric((values,) if isinstance(values, str) else values, value)
    return family


def _histogram(
    name: str,
    help_text: str,
    samples: Iterable[tuple[tuple[str, ...], Histogram]],
    labels: Sequence[str] = (),
    prefix: str = _PREFIX,
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"{prefix}{name}", help_text, labels=labels)
    for values, histogram in samples:
        counts, total = histogram.read()
        cumulative = np.cumsum(counts).tolist()
        bounds = [*(f"{bound:g}" for bound in histogram.bounds.tolist()), "+Inf"]
        family.add_metric(values, list(zip(bounds, cumulative, strict=True)), total)
    return family
