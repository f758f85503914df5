"""`cellserve top`: a live view of a server, out of its Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from cellserve.cli.metrics import Histogram, Snapshot, read_metrics
from cellserve.cli.options import JsonOption, MetricsUrlOption, ModelOption, Options, options_of
from cellserve.cli.output import make_console, write_json
from cellserve.cli.problems import CommandError

__all__ = ["View", "top", "view_between"]


@dataclass(frozen=True, slots=True)
class View:
    """A server over an interval. Sessions and steps pending are those at its end; None where nothing was counted."""

    seconds: float
    sessions_by_tier: dict[str, int]
    session_capacity: int
    num_streams: int
    num_steps_pending: int
    tokens_per_second: float
    ticks_per_second: float
    mean_batch_size: float | None
    step_p50_seconds: float | None
    step_p99_seconds: float | None
    queue_p99_seconds: float | None
    failures_by_reason: dict[str, int]
    num_steps_total: int


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Measure one interval, print it and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to measure.")] = 1.0,
    metrics_url: MetricsUrlOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Show sessions, tokens a second, batch sizes and step latencies of a server; with --model those of one model.

    Read from its Prometheus endpoint alone. Ctrl-C ends it. JSON: one object a line for each interval.
    """
    options = options_of(context, metrics_url=metrics_url, model=model, writes_json=writes_json)
    views = _measure(options, interval)
    try:
        if options.writes_json:
            for view in views:
                write_json(asdict(view))
                if once:
                    return
        elif once:
            make_console().print(_render(next(views), options))
        else:
            _show(views, options)
    except KeyboardInterrupt:
        return


def view_between(earlier: Snapshot, later: Snapshot, labels: dict[str, str]) -> View:
    """What happened between two readings. labels: of the series to count, {"model": name} say."""
    seconds = later.at_seconds - earlier.at_seconds

    def increase(name: str) -> float:
        before, now = earlier.total(name, **labels), later.total(name, **labels)
        return now - before if now >= before else now  # less than before: the server was restarted between

    def histogram(name: str) -> Histogram:
        return later.histogram(name, **labels).since(earlier.histogram(name, **labels))

    batches, steps = histogram("cellserve_batch_size"), histogram("cellserve_step_duration_seconds")
    failures = later.by_label("cellserve_run_failures_total", "reason")
    failures_before = earlier.by_label("cellserve_run_failures_total", "reason")
    tiers = later.by_label("cellserve_sessions", "tier", **labels)
    return View(
        seconds=seconds,
        sessions_by_tier={tier: int(number) for tier, number in sorted(tiers.items())},
        session_capacity=int(later.total("cellserve_session_capacity")),
        num_streams=int(later.total("cellserve_streams")),
        num_steps_pending=int(later.total("cellserve_steps_pending")),
        tokens_per_second=increase("cellserve_steps_total") / seconds,
        ticks_per_second=batches.count / seconds,
        mean_batch_size=batches.mean,
        step_p50_seconds=steps.quantile(0.5),
        step_p99_seconds=steps.quantile(0.99),
        queue_p99_seconds=histogram("cellserve_step_queue_seconds").quantile(0.99),
        failures_by_reason={
            reason: int(number - failures_before.get(reason, 0.0))
            for reason, number in sorted(failures.items())
            if number > failures_before.get(reason, 0.0)
        },
        num_steps_total=int(later.total("cellserve_steps_total", **labels)),
    )


def _measure(options: Options, interval_seconds: float) -> Iterator[View]:
    """A view for each interval, for ever. Raises CommandError."""
    labels = {} if options.model is None else {"model": options.model}
    earlier = read_metrics(options.metrics_url)
    served = earlier.by_label("cellserve_model_info", "model")
    if not served:
        raise CommandError(f"{options.metrics_url} is no endpoint of cellserve-server; name its with --metrics-url")
    if options.model is not None and options.model not in served:
        raise CommandError(f"the server has no model {options.model!r}; it serves: {', '.join(sorted(served))}")
    while True:
        time.sleep(interval_seconds)
        later = read_metrics(options.metrics_url)
        yield view_between(earlier, later, labels)
        earlier = later


def _show(views: Iterator[View], options: Options) -> None:
    console = make_console()
    if not console.is_terminal:
        for view in views:
            console.print(_render(view, options))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for view in views:
            live.update(_render(view, options), refresh=True)


def _render(view: View, options: Options) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, title=_title(options), title_justify="left")
    num_sessions = sum(view.sessions_by_tier.values())
    tiers = ", ".join(f"{tier} {number:,}" for tier, number in view.sessions_by_tier.items())
    table.add_row("sessions", f"{num_sessions:,} of {view.session_capacity:,}", tiers)
    table.add_row("streams", f"{view.num_streams:,}", "")
    table.add_row(
        "tokens/s",
        f"{view.tokens_per_second:,.0f}",
        f"{view.num_steps_total:,} since start, {view.num_steps_pending:,} pending",
    )
    mean = "" if view.mean_batch_size is None else f"{view.mean_batch_size:,.1f} rows on average"
    table.add_row("ticks/s", f"{view.ticks_per_second:,.0f}", mean)
    table.add_row(
        "step latency", f"p50 {_milliseconds(view.step_p50_seconds)}", f"p99 {_milliseconds(view.step_p99_seconds)}"
    )
    table.add_row("queue wait", "", f"p99 {_milliseconds(view.queue_p99_seconds)}")
    refused = ", ".join(f"{reason} {number:,}" for reason, number in view.failures_by_reason.items())
    table.add_row("refused", f"{sum(view.failures_by_reason.values()):,}", refused)
    return table


def _title(options: Options) -> str:
    return f"{options.metrics_url}{'' if options.model is None else f', model {options.model}'}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"
