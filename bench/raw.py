"""Raw gRPC clients: prepared bytes out, bytes in, the same loop for the echo, the service and the naive server.

So a ratio of two of them tells of the servers alone. A message is sent when the answer to the last has come.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeAlias

import numpy as np
from grpc import aio

from bench.samples import Sample, cpu_seconds

__all__ = ["Caller", "Exchanger", "UnaryCaller", "measure"]

_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
# To take the time of every message would itself take time.
_TIMED_ONE_IN: Final = 8

Call: TypeAlias = "aio.StreamStreamCall[bytes, bytes]"
Messages = Sequence[Sequence[bytes]]


class Exchanger:
    """Bidirectional calls of one method, kept open; a context manager.

    calls: one for each stream. num_channels: connections, over which the streams are spread. is_last: whether a message
    is the last of an answer; None: every answer is one message.
    """

    def __init__(
        self,
        target: str,
        method: str,
        num_streams: int,
        *,
        num_channels: int = 1,
        is_last: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._channels = [aio.insecure_channel(target, options=_OPTIONS) for _ in range(num_channels)]
        self._method, self._num_streams = method, num_streams
        self._is_last = is_last
        self.calls: list[Call] = []

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(asyncio.wait_for(channel.channel_ready(), 30) for channel in self._channels))
        stubs: list[aio.StreamStreamMultiCallable[bytes, bytes]] = [
            channel.stream_stream(self._method) for channel in self._channels
        ]
        self.calls = [stubs[number % len(stubs)]() for number in range(self._num_streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def ask(self, messages: Sequence[bytes]) -> list[list[bytes]]:
        """One message on each stream, and the messages of its answer."""
        asked = (_ask(call, message, self._is_last) for call, message in zip(self.calls, messages, strict=True))
        return list(await asyncio.gather(*asked))

    async def exchange(self, messages: Messages, num_steps: int) -> list[float]:
        """On every stream num_steps messages, round and round; returns how long some of them took, in seconds."""
        latencies = array("d")
        async with asyncio.TaskGroup() as tasks:
            for number, (call, column) in enumerate(zip(self.calls, messages, strict=True)):
                if self._is_last is not None:
                    tasks.create_task(_follow_parts(call, column, num_steps, latencies, self._is_last))
                elif number % _TIMED_ONE_IN:
                    tasks.create_task(_follow(call, column, num_steps))
                else:
                    tasks.create_task(_follow_timed(call, column, num_steps, latencies))
        return latencies.tolist()


class UnaryCaller:
    """Unary calls of one method on one channel, some at a time; a context manager."""

    def __init__(self, target: str, method: str, num_callers: int) -> None:
        self._channel = aio.insecure_channel(target, options=_OPTIONS)
        self._method, self._num_callers = method, num_callers
        self._stub: aio.UnaryUnaryMultiCallable[bytes, bytes] | None = None

    async def __aenter__(self) -> Self:
        await asyncio.wait_for(self._channel.channel_ready(), 30)
        self._stub = self._channel.unary_unary(self._method)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def ask(self, messages: Sequence[bytes]) -> list[list[bytes]]:
        """As Exchanger.ask."""
        assert self._stub is not None
        stub = self._stub
        return [[answer] for answer in await asyncio.gather(*(stub(message) for message in messages))]

    async def exchange(self, messages: Messages, num_steps: int) -> list[float]:
        """As Exchanger.exchange, each caller one call after the other."""
        assert self._stub is not None
        latencies = array("d")
        async with asyncio.TaskGroup() as tasks:
            for column in messages:
                tasks.create_task(_call_in_turn(self._stub, column, num_steps, latencies))
        return latencies.tolist()


Caller = Exchanger | UnaryCaller


async def measure(
    caller: Caller, messages: Messages, seconds: float, server_pid: int, *, tokens_per_message: int = 1
) -> Sample:
    """Exchange messages for about so long."""
    num_steps = await _steps_for(lambda steps: caller.exchange(messages, steps), seconds)
    client_cpu, server_cpu = time.process_time(), cpu_seconds(server_pid)
    begin = time.perf_counter()
    latencies = await caller.exchange(messages, num_steps)
    elapsed = time.perf_counter() - begin
    num_tokens = num_steps * len(messages) * tokens_per_message
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return Sample(
        tokens_per_second=num_tokens / elapsed,
        p50_seconds=float(p50),
        p99_seconds=float(p99),
        client_cpu_microseconds=1e6 * (time.process_time() - client_cpu) / num_tokens,
        server_cpu_microseconds=1e6 * (cpu_seconds(server_pid) - server_cpu) / num_tokens,
    )


async def _steps_for(run: Callable[[int], Awaitable[object]], seconds: float) -> int:
    """How many steps take so long, by a trial of a tenth of it."""
    num_steps = 1
    while True:
        begin = time.perf_counter()
        await run(num_steps)
        elapsed = time.perf_counter() - begin
        if elapsed > seconds / 10:
            return max(1, round(num_steps * seconds / elapsed))
        num_steps *= 4


async def _ask(call: Call, message: bytes, is_last: Callable[[bytes], bool] | None) -> list[bytes]:
    await call.write(message)
    answers = []
    while True:
        answer = await call.read()
        assert isinstance(answer, bytes), "the server has ended a stream"
        answers.append(answer)
        if is_last is None or is_last(answer):
            return answers


async def _follow_parts(
    call: Call, column: Sequence[bytes], num_steps: int, latencies: array[float], is_last: Callable[[bytes], bool]
) -> None:
    for step in range(num_steps):
        begin = time.perf_counter()
        await _ask(call, column[step % len(column)], is_last)
        latencies.append(time.perf_counter() - begin)


async def _follow(call: Call, column: Sequence[bytes], num_steps: int) -> None:
    number = len(column)
    for step in range(num_steps):
        await call.write(column[step % number])
        assert isinstance(await call.read(), bytes)


async def _follow_timed(call: Call, column: Sequence[bytes], num_steps: int, latencies: array[float]) -> None:
    number = len(column)
    for step in range(num_steps):
        begin = time.perf_counter()
        await call.write(column[step % number])
        assert isinstance(await call.read(), bytes)
        latencies.append(time.perf_counter() - begin)


async def _call_in_turn(
    stub: aio.UnaryUnaryMultiCallable[bytes, bytes], column: Sequence[bytes], num_steps: int, latencies: array[float]
) -> None:
    number = len(column)
    for step in range(num_steps):
        begin = time.perf_counter()
        await stub(column[step % number])
        latencies.append(time.perf_counter() - begin)
