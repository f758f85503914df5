"""What the sessions of one client share: the channel, the stream, the models looked up, and who closes at the end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from cellserve._deadline import Timeout, until
from cellserve._info import ModelInfo, ServerLimits
from cellserve._model import ServedModel
from cellserve._stream import Connection
from cellserve._transport import Metadata, Tls, Transport
from cellserve.errors import CellserveError, ClosedError
from cellserve.v1.model_service_pb2 import GetModelRequest

if TYPE_CHECKING:
    import grpc

    from cellserve._session import AsyncSession

__all__ = ["Hub", "close_quietly"]

_MAX_CLOSING_SECONDS: Final = 5.0


class Hub:
    """The inside of a client. Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        target: str,
        tls: bool | Tls | grpc.ChannelCredentials | None,
        metadata: Metadata | None,
        timeout_seconds: float,
    ) -> None:
        self.target = target
        self.default_timeout = Timeout(timeout_seconds)
        self._tls = tls
        self._metadata = metadata
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: Transport | None = None
        self._connection: Connection | None = None
        self._lookups: dict[str, asyncio.Task[ServedModel]] = {}
        self._sessions: set[AsyncSession] = set()
        self._is_closed = False

    @property
    def transport(self) -> Transport:
        """The channel to the server, made at the first use."""
        if self._transport is None:
            if self._is_closed:
                raise ClosedError("this client was closed")
            self._loop = asyncio.get_running_loop()
            self._transport = Transport(self.target, self._tls, self._metadata)
        elif self._loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncClient belongs to the event loop in which it was first used")
        return self._transport

    def timeout(self, timeout_seconds: float | None) -> Timeout:
        """The timeout of a call that was given this one."""
        return self.default_timeout if timeout_seconds is None else Timeout(timeout_seconds)

    def connect(self, limits: ServerLimits) -> Connection:
        """The open stream; a new one where there is none."""
        if self._is_closed:
            raise ClosedError("this client was closed")
        if self._connection is None or not self._connection.is_open:
            if self._connection is not None:
                self._lookups.clear()  # the server may have been replaced by one with other models and limits
            self._connection = Connection(self.transport.open_stream(), limits)
        return self._connection

    async def look_up(self, model: str, deadline: float) -> ServedModel:
        """A model by name. Raises ModelNotFound."""
        # One question for all who ask at once; what could not be answered is asked again.
        lookup = self._lookups.get(model)
        if lookup is None or (lookup.done() and (lookup.cancelled() or lookup.exception() is not None)):
            lookup = self._lookups[model] = asyncio.create_task(self._get_model(model, self.transport))
        async with until(deadline, "looking up the model"):
            return await asyncio.shield(lookup)

    def remember(self, session: AsyncSession) -> None:
        """The session closes with the client, unless it is forgotten before."""
        self._sessions.add(session)

    def forget(self, session: AsyncSession) -> None:
        """The session is not to be closed with the client."""
        self._sessions.discard(session)

    async def close(self) -> None:
        """Closes the sessions that are remembered, then the stream, then the channel, in bounded time."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._transport is None or self._loop is None:
            return
        deadline = self._loop.time() + min(self.default_timeout.seconds, _MAX_CLOSING_SECONDS)
        if self._sessions:
            closings = [asyncio.create_task(close_quietly(session)) for session in self._sessions]
            _, late = await asyncio.wait(closings, timeout=deadline - self._loop.time())
            for closing in late:
                closing.cancel()
        if self._connection is not None:
            await self._connection.finish(deadline)
        await self._transport.close()

    async def _get_model(self, model: str, transport: Transport) -> ServedModel:
        request = GetModelRequest(name=model)
        response = await transport.call(transport.models.GetModel, request, self.default_timeout.seconds)
        return ServedModel(ModelInfo.from_message(response.model), ServerLimits.from_message(response.limits))


async def close_quietly(session: AsyncSession) -> None:
    """Closes a session that nobody can be told about any more."""
    with contextlib.suppress(CellserveError):
        await session.close()
