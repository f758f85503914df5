"""`cellserve bench`: loads a server and tells how it bore it, or how many sessions it holds at a latency target."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cellserve import AsyncClient, AsyncSession, ModelInfo
from cellserve.cli.options import JsonOption, ModelOption, Options, ServerOption, options_of
from cellserve.cli.output import make_console, make_table, write_json
from cellserve.cli.problems import MisuseError, async_client
from cellserve.load import Driver, LoadResult, Mix, MixError, Trial, most_sessions, parse_mix, run_precisely

__all__ = ["bench"]

_REFRESH_SECONDS: Final = 0.2
_WARM_UP_SECONDS: Final = 0.5
_OPEN_AT_ONCE: Final = 2000


def bench(
    context: typer.Context,
    sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Sessions, each with one request at a time.")] = 64,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="R",
            help="Requests a second of all sessions together, at random times that are fixed beforehand; latencies "
            "count from these times. Default: each session sends its next request when it has the last answer.",
        ),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to load the server.")] = 10.0,
    mix: Annotated[
        str,
        typer.Option(
            metavar="KINDS", help="Requests, with weights: step:8,run16:1,generate32:1 (tokens behind the kind)."
        ),
    ] = "step",
    target_p99_ms: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="MS",
            help="Find the most sessions with this 99th percentile: --sessions is the first number tried, and --rate "
            "grows with it.",
        ),
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Where the search ends.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens, the mix and the times.")] = 0,
    server: ServerOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Load a server with passing sessions, and print tokens a second and latencies.

    JSON: an object with "server", "model", "mix", "sessions", "rate", "seconds", "num_requests", "num_tokens",
    "requests_per_second", "tokens_per_second", "latency_seconds" ("all" and each kind: "num_requests", "p50", "p90",
    "p99", "p999", "max"), "send_lag_p99_seconds" (how late this command itself was; null without a rate) and
    "failures" by reason. With --target-p99-ms "sessions_held" (null: not even one), "target_p99_seconds" and "trials",
    each such an object with "met".
    """
    options = options_of(context, server=server, model=model, writes_json=writes_json)
    try:
        parsed = parse_mix(mix)
    except MixError as error:
        raise MisuseError(str(error)) from None
    if target_p99_ms is None:
        run_precisely(_load(options, parsed, sessions, rate, duration, seed))
    else:
        rate_per_session = None if rate is None else rate / sessions
        run_precisely(
            _search(options, parsed, sessions, rate_per_session, duration, seed, target_p99_ms / 1000, max_sessions)
        )


async def _load(options: Options, mix: Mix, num_sessions: int, rate: float | None, seconds: float, seed: int) -> None:
    async with async_client(options.server, options.tls) as client:
        model = await _choose_model(options, client, mix)
        driver = Driver(client, model, mix, seed=seed)
        sessions = await _open(driver, num_sessions)
        await driver.run(sessions, min(_WARM_UP_SECONDS, seconds), rate=rate)
        async with _progress(driver, seconds, f"{num_sessions:,} sessions"):
            result = await driver.run(sessions, seconds, rate=rate)
    if options.writes_json:
        write_json(_head(options, model, mix) | _document(num_sessions, rate, result))
    else:
        _print([(num_sessions, result)], options, model)


async def _search(
    options: Options,
    mix: Mix,
    first: int,
    rate_per_session: float | None,
    seconds: float,
    seed: int,
    target_p99_seconds: float,
    max_sessions: int,
) -> None:
    async with async_client(options.server, options.tls) as client:
        model = await _choose_model(options, client, mix)
        driver = Driver(client, model, mix, seed=seed)
        sessions: list[AsyncSession] = []

        def rate_of(num_sessions: int) -> float | None:
            return None if rate_per_session is None else rate_per_session * num_sessions

        async def attempt(num_sessions: int) -> LoadResult:
            if num_sessions > len(sessions):
                sessions.extend(await _open(driver, num_sessions - len(sessions)))
            used, rate = sessions[:num_sessions], rate_of(num_sessions)
            await driver.run(used, min(_WARM_UP_SECONDS, seconds), rate=rate)
            async with _progress(driver, seconds, f"{num_sessions:,} sessions"):
                return await driver.run(used, seconds, rate=rate)

        trials = await most_sessions(
            attempt, first=first, target_p99_seconds=target_p99_seconds, max_sessions=max_sessions
        )
    held = max((trial.num_sessions for trial in trials if trial.met), default=None)
    if options.writes_json:
        documents = [
            _document(trial.num_sessions, rate_of(trial.num_sessions), trial.result) | {"met": trial.met}
            for trial in trials
        ]
        found = {"sessions_held": held, "target_p99_seconds": target_p99_seconds, "trials": documents}
        write_json(_head(options, model, mix) | found)
        return
    _print([(trial.num_sessions, trial.result) for trial in trials], options, model)
    target = f"with a p99 of at most {1000 * target_p99_seconds:g} ms"
    if held is None:
        make_console().print(f"not one session {target}", markup=False)
    elif held == max_sessions:
        make_console().print(f"{held:,} sessions {target}, and perhaps more; see --max-sessions", markup=False)
    else:
        make_console().print(f"{held:,} sessions {target}{_next_number(trials, held)}", markup=False)


async def _choose_model(options: Options, client: AsyncClient, mix: Mix) -> ModelInfo:
    model = options.choose_model(await client.models())
    generates = any(work.kind == "generate" for work in mix.works)
    if generates and (model.vocab_size is None or model.output_size != model.vocab_size):
        raise MisuseError(f"{model.name} cannot generate: leave it out of --mix, or name another with --model")
    return model


async def _open(driver: Driver, number: int) -> list[AsyncSession]:
    opened: list[AsyncSession] = []
    while len(opened) < number:
        opened += await driver.open_sessions(min(_OPEN_AT_ONCE, number - len(opened)))
    return opened


@asynccontextmanager
async def _progress(driver: Driver, seconds: float, what: str) -> AsyncIterator[None]:
    """Shows on standard error, so that a redirected output holds results alone, how far a load is and what it does."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = asyncio.create_task(_show(driver, progress, progress.add_task(what, total=seconds, now="")))
        try:
            yield
        finally:
            task.cancel()


async def _show(driver: Driver, progress: Progress, bar: TaskID) -> None:
    loop = asyncio.get_running_loop()
    begin = then = loop.time()
    tokens_then = 0
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        now, tokens = loop.time(), driver.recorder.num_tokens
        rate = (tokens - tokens_then) / (now - then)
        progress.update(bar, completed=now - begin, now=f"{rate:,.0f} tokens/s")
        then, tokens_then = now, tokens


def _head(options: Options, model: ModelInfo, mix: Mix) -> dict[str, object]:
    weights = {work.name: weight for work, weight in zip(mix.works, mix.weights, strict=True)}
    return {"server": options.server, "model": model.name, "mix": weights}


def _document(num_sessions: int, rate: float | None, result: LoadResult) -> dict[str, object]:
    latencies = {"all": _latencies(result, None)} | {name: _latencies(result, name) for name in result.latencies}
    return {
        "sessions": num_sessions,
        "rate": rate,
        "seconds": result.seconds,
        "num_requests": result.num_requests,
        "num_tokens": result.num_tokens,
        "requests_per_second": result.requests_per_second,
        "tokens_per_second": result.tokens_per_second,
        "latency_seconds": latencies,
        "send_lag_p99_seconds": result.send_lag(0.99),
        "failures": result.failures,
    }


def _latencies(result: LoadResult, name: str | None) -> dict[str, object]:
    number = result.num_requests if name is None else len(result.latencies[name])
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {"num_requests": number} | {key: result.quantile(value, name) for key, value in quantiles.items()}


def _print(results: Sequence[tuple[int, LoadResult]], options: Options, model: ModelInfo) -> None:
    console = make_console()
    console.print(f"{model.name} on {options.server}", markup=False)
    table = make_table("sessions", "requests", "of", "requests/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "max ms")
    for num_sessions, result in results:
        for name, latencies in result.latencies.items():
            number = len(latencies)
            tokens = result.tokens_per_second if len(result.latencies) == 1 else None
            table.add_row(
                f"{num_sessions:,}",
                f"{number:,}",
                name,
                f"{number / result.seconds:,.0f}",
                "" if tokens is None else f"{tokens:,.0f}",
                *(_milliseconds(result.quantile(fraction, name)) for fraction in (0.5, 0.9, 0.99, 1.0)),
            )
        if len(result.latencies) > 1:
            table.add_row(
                f"{num_sessions:,}",
                f"{result.num_requests:,}",
                "all",
                f"{result.requests_per_second:,.0f}",
                f"{result.tokens_per_second:,.0f}",
                *(_milliseconds(result.quantile(fraction)) for fraction in (0.5, 0.9, 0.99, 1.0)),
            )
    console.print(table)
    for num_sessions, result in results:
        if result.failures:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in result.failures.items())
            console.print(f"{num_sessions:,} sessions: {result.num_failures:,} refused: {reasons}", markup=False)
    lag = results[-1][1].send_lag(0.99)
    if lag is not None:
        console.print(f"this command was late to send by {1000 * lag:.2f} ms at p99, which the latencies contain")


def _next_number(trials: Sequence[Trial], held: int) -> str:
    missed = min((trial.num_sessions for trial in trials if not trial.met and trial.num_sessions > held), default=None)
    return "" if missed is None else f"; {missed:,} are too many"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f}"
