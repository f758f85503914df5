"""Registers servicers by the contract's descriptors, and counts every call of theirs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from cellserve_service.errors import invalid
from cellserve_service.statistics import FrontStatistics
from cellserve_service.status import abort

Behavior = Callable[[Any, Any], Awaitable[Any]]


class CallsInFlight:
    """Counts the calls that have not ended, so that a draining server can wait for their answers to be written."""

    def __init__(self) -> None:
        self._number = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._number += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._number -= 1
        if not self._number:
            self._none.set()

    async def wait_for_none(self) -> None:
        await self._none.wait()


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    behaviors: dict[str, Behavior],
    statistics: FrontStatistics,
    in_flight: CallsInFlight,
) -> None:
    """Serve a service of the contract. behaviors: one for each method, by its name in snake case.

    Requests are decoded by ourselves, so that one that cannot be decoded is refused like any other bad input. A method
    that streams both ways gets and gives raw bytes: there it is refused in-band, and does not end the stream.
    """
    handlers = {}
    for method in service.methods:
        behavior = behaviors[re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()]
        handlers[method.name] = _handler(method, _counted(method, _decoding(method, behavior), statistics, in_flight))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(method: MethodDescriptor, behavior: Behavior) -> grpc.RpcMethodHandler[Any, Any]:
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(behavior)
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = (
        grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    )
    return make(behavior, response_serializer=GetMessageClass(method.output_type).SerializeToString)


def _decoding(method: MethodDescriptor, behavior: Behavior) -> Behavior:
    """The behavior of a method with one request, given the request's bytes."""
    if method.client_streaming:
        return behavior
    request_type = GetMessageClass(method.input_type)

    async def decoded(request: bytes, context: Any) -> Any:
        try:
            message = request_type.FromString(request)
        except DecodeError:
            await abort(context, invalid(f"the request is no {method.input_type.full_name}"))
        return await behavior(message, context)

    return decoded


def _counted(
    method: MethodDescriptor, behavior: Behavior, statistics: FrontStatistics, in_flight: CallsInFlight
) -> Behavior:
    kind = "bidi_stream" if method.client_streaming else "server_stream" if method.server_streaming else "unary"
    labels = (kind, method.containing_service.full_name, method.name)
    counts = statistics.calls[labels]

    async def counted(request: Any, context: Any) -> Any:
        counts.started += 1
        begun_at = time.monotonic()
        code = grpc.StatusCode.UNKNOWN
        try:
            with in_flight:
                answer = await behavior(request, context)
            code = grpc.StatusCode.OK
            return answer
        except grpc.aio.AbortError:
            code = grpc.StatusCode(context.code()) if isinstance(context.code(), tuple) else context.code()
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.InternalError:
            # Nothing can be written any more: the client is gone, as if it had cancelled.
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        finally:
            counts.handled[getattr(code, "name", str(code))] += 1
            counts.handling_seconds.observe_one(time.monotonic() - begun_at)

    return counted
