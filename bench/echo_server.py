"""`python -m bench.echo_server PORT`: the limit that the wire sets, a raw `grpc.aio` echo, streaming and unary."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from grpc import (
    RpcMethodHandler,
    aio,
    method_handlers_generic_handler,
    stream_stream_rpc_method_handler,
    unary_unary_rpc_method_handler,
)

from bench.methods import ECHO_STREAM, ECHO_UNARY

_OPTIONS: Final = [("grpc.max_concurrent_streams", 100_000), ("grpc.so_reuseport", 0)]


async def _echo_stream(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
    while isinstance(message := await context.read(), bytes):
        await context.write(message)


async def _echo_unary(message: bytes, _: aio.ServicerContext[bytes, bytes]) -> bytes:
    return message


async def _serve(port: int) -> None:
    server = aio.server(options=_OPTIONS)
    stream: RpcMethodHandler[bytes, bytes] = stream_stream_rpc_method_handler(_echo_stream)
    unary: RpcMethodHandler[bytes, bytes] = unary_unary_rpc_method_handler(_echo_unary)
    service = ECHO_STREAM.split("/")[1]
    handlers = {ECHO_STREAM.split("/")[2]: stream, ECHO_UNARY.split("/")[2]: unary}
    server.add_generic_rpc_handlers((method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
