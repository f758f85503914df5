"""E2: requests that are due at random times fixed beforehand, beside an echo that is asked as often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from bench.methods import ECHO_STREAM
from bench.processes import PeerServer, echo_server
from bench.raw import Call, Exchanger, measure
from bench.rows import Goal, Row
from bench.running import Bench, check_next_tokens
from cellserve import AsyncClient
from cellserve.load import Driver, Loaded, LoadResult, parse_mix

__all__ = ["open_loops"]

_HIDDEN_SIZE: Final = 512
# Of the lower of both capacities, with the most that our p99 may be of the echo's.
_LOADS: Final = ((0.5, 3.0), (0.8, 6.0))
_SWEEP: Final = (0.1, 0.25, 0.5, 0.65, 0.8, 0.9)
_MESSAGE: Final = bytes(40)


class _EchoStream:
    """An echo in the place of a session."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.position = 0

    async def step(self, _: Any, /) -> object:
        await self._call.write(_MESSAGE)
        self.position += 1
        return await self._call.read()

    def generate(self, max_tokens: int, /) -> AsyncIterator[int]:
        raise NotImplementedError


async def open_loops(bench: Bench) -> None:
    """E2: latencies at half and at four fifths of what both can do, then ours alone up to what it can."""
    bench.model(_HIDDEN_SIZE)
    number = 64 if bench.effort.is_quick else 1024
    seconds = 5 * bench.effort.seconds
    with echo_server() as echo, bench.server() as server:
        async with AsyncClient(server.target) as client, _echo_streams(echo, number) as echoes:
            checked = await check_next_tokens(bench, client, _HIDDEN_SIZE)
            model = next(model for model in await client.models() if model.name == f"gru{_HIDDEN_SIZE}")
            driver = Driver(client, model, parse_mix("step"))
            sessions = await driver.open_sessions(number)
            ours = (await driver.run(sessions, seconds)).requests_per_second
            echoed = await _echo_capacity(echo, number, bench.effort.seconds)
            for load, goal in _LOADS:
                rate = load * min(ours, echoed)
                size: dict[str, int | str] = {
                    "H": 512,
                    "sessions": number,
                    "requests/s": round(rate),
                    "load": _percent(load),
                }
                row = Row("E2", "p99 on a schedule", size, "ms", "raw echo at this rate", Goal("<=", goal), checked)
                bench.tell(f"E2: {row.name}, beside {row.beside}")
                for _ in range(min(3, bench.effort.turns)):
                    limit = await driver.run(echoes, seconds, rate=rate)
                    result = await driver.run(sessions, seconds, rate=rate)
                    row.add(_p99(result), _p99(limit), **_details(result))
                bench.add(row)
            for load in () if bench.effort.is_quick else _SWEEP:
                rate = load * ours
                size = {"H": 512, "sessions": number, "requests/s": round(rate), "load": _percent(load)}
                row = Row("E2", "p99 on a schedule, of our own capacity", size, "ms", checked=checked)
                bench.tell(f"E2: {row.name}")
                result = await driver.run(sessions, seconds, rate=rate)
                row.add(_p99(result), None, **_details(result))
                bench.add(row)


@asynccontextmanager
async def _echo_streams(echo: PeerServer, number: int) -> AsyncIterator[Sequence[Loaded]]:
    async with Exchanger(echo.target, ECHO_STREAM, number) as exchanger:
        yield [_EchoStream(call) for call in exchanger.calls]


async def _echo_capacity(echo: PeerServer, number: int, seconds: float) -> float:
    async with Exchanger(echo.target, ECHO_STREAM, number) as exchanger:
        sample = await measure(exchanger, [[_MESSAGE]] * number, seconds, echo.pid)
    await asyncio.sleep(0.1)
    return sample.tokens_per_second


def _p99(result: LoadResult) -> float:
    p99 = result.quantile(0.99)
    assert p99 is not None
    return 1000 * p99


def _details(result: LoadResult) -> dict[str, float]:
    p50, p999, lag = result.quantile(0.5), result.quantile(0.999), result.send_lag(0.99)
    return {
        "p50_ms": 1000 * (p50 or 0.0),
        "p999_ms": 1000 * (p999 or 0.0),
        "send_lag_p99_ms": 1000 * (lag or 0.0),
        "refused": float(result.num_failures),
    }


def _percent(load: float) -> str:
    return f"{100 * load:.0f} %"
