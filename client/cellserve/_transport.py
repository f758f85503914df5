"""The gRPC channel to one server: credentials, unary calls with typed errors, and the streaming calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from cellserve._status import status_error
from cellserve.columns import StreamResponse
from cellserve.errors import ClosedError, Unavailable
from cellserve.v1.model_service_pb2_grpc import ModelServiceStub
from cellserve.v1.session_service_pb2 import GenerateRequest, GenerateResponse
from cellserve.v1.session_service_pb2_grpc import SessionServiceStub

if TYPE_CHECKING:
    GenerateCall: TypeAlias = aio.UnaryStreamCall[GenerateRequest, GenerateResponse]
    StreamCall: TypeAlias = aio.StreamStreamCall[bytes, Any]

__all__ = ["Metadata", "Tls", "Transport"]

# What travels with every call: pairs of a lower-case key and a value.
Metadata: TypeAlias = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

_STREAM_METHOD: Final = "/cellserve.v1.SessionService/Stream"
_HEALTH_METHOD: Final = "/grpc.health.v1.Health/Check"
_SERVING: Final = b"\x08\x01"  # a serialized HealthCheckResponse with status SERVING

_CHANNEL_OPTIONS: Final = (
    # Messages are bounded by the server's limits; an exported state may be of any size.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A connection of its own: clients of one process would otherwise share one, and its fate.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server that is gone without a word would otherwise be waited for until the last timeout.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_AUTHORITY_OPTION: Final = "grpc.default_authority"


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates for a TLS connection: PEM bytes, or paths of PEM files.

    root_certificates None: the system's. private_key and certificate_chain identify this client, where the
    server asks.
    """

    root_certificates: bytes | str | Path | None = None
    private_key: bytes | str | Path | None = field(default=None, repr=False)
    certificate_chain: bytes | str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC. Raises OSError where a file cannot be read."""
        return grpc.ssl_channel_credentials(
            _pem(self.root_certificates), _pem(self.private_key), _pem(self.certificate_chain)
        )


class Transport:
    """A channel and what is called on it. Belongs to the running event loop.

    authority: the name that the server goes by, where the target is one of the addresses of that name.
    """

    def __init__(
        self,
        target: str,
        tls: bool | Tls | grpc.ChannelCredentials | None,
        metadata: Metadata | None,
        authority: str | None = None,
    ) -> None:
        self.target = target
        self.is_closed = False
        options = _CHANNEL_OPTIONS if authority is None else (*_CHANNEL_OPTIONS, (_AUTHORITY_OPTION, authority))
        self._metadata = tuple(metadata.items() if isinstance(metadata, Mapping) else metadata or ())
        if tls is None or tls is False:
            self._channel = aio.insecure_channel(target, options=options)
        else:
            if tls is True:
                tls = Tls()
            credentials = tls.credentials() if isinstance(tls, Tls) else tls
            self._channel = aio.secure_channel(target, credentials, options=options)
        self.models = ModelServiceStub(self._channel)
        self.sessions = SessionServiceStub(self._channel)
        self._stream: aio.StreamStreamMultiCallable[bytes, Any] = self._channel.stream_stream(
            _STREAM_METHOD,
            request_serializer=None,  # frames are made serialized
            response_deserializer=StreamResponse.FromString,
        )
        self._health: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_HEALTH_METHOD)

    async def call(
        self,
        method: aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float,
        session_id: str | None = None,
    ) -> ResponseT:
        """One unary call. session_id: for the error, where there is one."""
        self._check_open()
        try:
            return await method(request, timeout=timeout_seconds, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise status_error(error, session_id) from None
        except asyncio.CancelledError:
            raise self.cancellation() from None

    async def check_health(self, timeout_seconds: float) -> float:
        """Asks the server's health service, and returns how long the answer took, in seconds."""
        self._check_open()
        started = time.perf_counter()
        try:
            answer = await self._health(b"", timeout=timeout_seconds, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise status_error(error) from None
        except asyncio.CancelledError:
            raise self.cancellation() from None
        if answer != _SERVING:
            raise Unavailable(f"the server at {self.target} is not serving")
        return time.perf_counter() - started

    def open_stream(self) -> StreamCall:
        """Begins a SessionService.Stream, whose requests are serialized frames."""
        self._check_open()
        return self._stream(metadata=self._metadata)

    def generate(self, request: GenerateRequest) -> GenerateCall:
        """Begins a SessionService.Generate."""
        self._check_open()
        return self.sessions.Generate(request, metadata=self._metadata)

    async def close(self) -> None:
        """Breaks off what is under way, and closes the channel."""
        self.is_closed = True
        await self._channel.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise ClosedError("this client was closed")

    def cancellation(self) -> BaseException:
        """What a CancelledError out of a call means: a cancelled task, or that the channel was closed."""
        task = asyncio.current_task()
        if self.is_closed and (task is None or not task.cancelling()):
            # gRPC cancels the calls of a channel that is closed; whoever waits on one has cancelled nothing.
            return ClosedError("the client was closed while the call was under way")
        return asyncio.CancelledError()


def _pem(source: bytes | str | Path | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()
