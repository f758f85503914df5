"""The limit that the wire sets: a raw `grpc.aio` bidirectional echo, one stream for each session.

`python -m bench.echo PORT` is the server; EchoClient the client.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final, Self, TypeAlias

from grpc import RpcMethodHandler, aio, method_handlers_generic_handler, stream_stream_rpc_method_handler

__all__ = ["EchoClient"]

_SERVICE: Final = "bench.Echo"
_METHOD: Final = f"/{_SERVICE}/Echo"
_MESSAGE: Final = bytes(16)  # a handle, a position, a token: what one step needs at least
_OPTIONS: Final = [("grpc.max_concurrent_streams", 100_000), ("grpc.so_reuseport", 0)]

Call: TypeAlias = "aio.StreamStreamCall[bytes, bytes]"


class EchoClient:
    """Streams on one channel, kept open; a context manager."""

    def __init__(self, port: int, num_streams: int) -> None:
        self._channel = aio.insecure_channel(f"127.0.0.1:{port}")
        self._num_streams = num_streams
        self._calls: list[Call] = []

    async def __aenter__(self) -> Self:
        await asyncio.wait_for(self._channel.channel_ready(), 30)
        echo: aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(_METHOD)
        self._calls = [echo() for _ in range(self._num_streams)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self._calls:
            call.cancel()
        await self._channel.close()

    async def tokens_per_second(self, num_steps: int) -> float:
        """On every stream, num_steps times: write a message, await its echo. A message stands for a token."""
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for call in self._calls:
                tasks.create_task(self._follow(call, num_steps))
        return num_steps * self._num_streams / (time.perf_counter() - begin)

    async def _follow(self, call: Call, num_steps: int) -> None:
        for _ in range(num_steps):
            await call.write(_MESSAGE)
            assert await call.read() == _MESSAGE


async def _echo(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
    while isinstance(message := await context.read(), bytes):
        await context.write(message)


async def _serve(port: int) -> None:
    server = aio.server(options=_OPTIONS)
    handler: RpcMethodHandler[bytes, bytes] = stream_stream_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((method_handlers_generic_handler(_SERVICE, {"Echo": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
