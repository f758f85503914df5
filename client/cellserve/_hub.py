"""What the sessions of one client share: the replicas, the models looked up, and who closes at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet

from google.protobuf.message import Message

from cellserve._backoff import retried
from cellserve._deadline import Timeout, until
from cellserve._info import ModelInfo, ServerLimits
from cellserve._model import ServedModel
from cellserve._moving import Mover
from cellserve._placement import preferred
from cellserve._replica import Replica
from cellserve._resolving import Addresses
from cellserve._transport import Metadata, Tls, Transport
from cellserve.errors import CellserveError, ClosedError
from cellserve.v1.model_service_pb2 import GetModelRequest

if TYPE_CHECKING:
    import grpc
    from grpc import aio

    from cellserve._attachment import Attachment
    from cellserve._many import Group
    from cellserve._session import AsyncSession

__all__ = ["Hub", "close_quietly"]

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
T = TypeVar("T")

_MAX_CLOSING_SECONDS: Final = 5.0


class Hub:
    """The inside of a client. Belongs to the event loop in which it is first used.

    attachments: of all the sessions, to be moved and closed with the client.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        tls: bool | Tls | grpc.ChannelCredentials | None,
        metadata: Metadata | None,
        timeout_seconds: float,
        max_kept_tokens: int,
    ) -> None:
        if max_kept_tokens < 1:
            raise ValueError(f"max_kept_tokens is a positive number of tokens, not {max_kept_tokens!r}")
        self.addresses = Addresses(target)
        self.default_timeout = Timeout(timeout_seconds)
        self.max_kept_tokens = max_kept_tokens
        self.attachments: WeakSet[Attachment] = WeakSet()
        self.last_group: Group | None = None  # of sessions stepped together; mostly the next one, too
        self.is_closed = False
        self._tls = tls
        self._metadata = metadata
        self._loop: asyncio.AbstractEventLoop | None = None
        self._replicas: dict[str, Replica] = {}
        self._mover = Mover(self)
        self._lookups: dict[str, asyncio.Task[ServedModel]] = {}
        self._sessions: set[AsyncSession] = set()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def replicas(self) -> Sequence[Replica]:
        """All replicas known, once a call has been made."""
        return tuple(self._replicas.values())

    def timeout(self, timeout_seconds: float | None) -> Timeout:
        """The timeout of a call that was given this one."""
        return self.default_timeout if timeout_seconds is None else Timeout(timeout_seconds)

    def deadline(self, timeout_seconds: float | None) -> float:
        """When a call ends that begins now, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self.timeout(timeout_seconds).seconds

    async def begin(self) -> None:
        """Finds the replicas, at the first use. Raises ClosedError, and Unavailable where a name has no address."""
        if self.is_closed:
            raise ClosedError("this client was closed")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        elif self._loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncClient belongs to the event loop in which it was first used")
        if not self._replicas:
            self._meet(await self.addresses.resolve())

    async def look_again(self) -> None:
        """Resolves the name again, and takes up what is new and lets go of what is gone."""
        targets = await self.addresses.resolve()
        self._meet(targets)
        for target in set(self._replicas) - set(targets):
            if not self._replicas[target].is_up:
                await self._replicas.pop(target).close(0.0)

    def place(self, session_id: str) -> Replica:
        """The replica that a session prefers among those believed up, or among all where none is."""
        replicas = [replica for replica in self._replicas.values() if replica.is_up] or list(self._replicas.values())
        if len(replicas) == 1:
            return replicas[0]
        return self._replicas[preferred(session_id, [replica.target for replica in replicas])]

    def any_replica(self, attempt: int) -> Replica:
        """A replica for what any can do; another one for the next attempt."""
        replicas = [replica for replica in self._replicas.values() if replica.is_up] or list(self._replicas.values())
        return replicas[attempt % len(replicas)]

    async def call(
        self,
        pick: Callable[[Transport], aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
        request: RequestT,
        deadline: float,
    ) -> ResponseT:
        """A unary call that any replica can answer, made again while it fails by something that passes."""
        num_attempts = 0

        async def attempt(seconds_left: float) -> ResponseT:
            nonlocal num_attempts
            await self.begin()
            replica = self.any_replica(num_attempts)
            num_attempts += 1
            return await self.call_once(replica, pick, request, seconds_left)

        return await retried(attempt, deadline)

    async def call_once(
        self,
        replica: Replica,
        pick: Callable[[Transport], aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
        request: RequestT,
        seconds_left: float,
        session_id: str | None = None,
    ) -> ResponseT:
        """A unary call at this replica."""
        try:
            return await replica.transport.call(pick(replica.transport), request, seconds_left, session_id)
        except CellserveError as error:
            if error.reason is None and error.code == "UNAVAILABLE":
                replica.failed()
            raise

    async def ping(self, deadline: float) -> float:
        """Asks every replica in turn until one serves; returns the seconds that took there and back. Not repeated."""
        await self.begin()
        seconds_left = deadline - asyncio.get_running_loop().time()
        for replica in self.replicas[:-1]:
            with contextlib.suppress(CellserveError):
                return await replica.transport.check_health(seconds_left / len(self.replicas))
        return await self.replicas[-1].transport.check_health(seconds_left)

    async def look_up(self, model: str, deadline: float) -> ServedModel:
        """A model by name. Raises ModelNotFound."""

        async def attempt(seconds_left: float) -> ServedModel:
            await self.begin()
            # One question for all who ask at once; what could not be answered is asked again.
            lookup = self._lookups.get(model)
            if lookup is None or (lookup.done() and (lookup.cancelled() or lookup.exception() is not None)):
                lookup = self._lookups[model] = asyncio.create_task(self._get_model(model))
            async with until(asyncio.get_running_loop().time() + seconds_left, "looking up the model"):
                return await asyncio.shield(lookup)

        return await retried(attempt, deadline)

    def carry_out(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins what goes on to its end also where the caller is cancelled: shield what is returned.

        A client that is closed waits for it.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._carried_out)
        return task

    def remember(self, session: AsyncSession) -> None:
        """The session closes with the client, unless it is forgotten before."""
        self._sessions.add(session)

    def forget(self, session: AsyncSession) -> None:
        """The session is not to be closed with the client."""
        self._sessions.discard(session)
        self.last_group = None  # it may be the last that holds on to the session

    async def close(self) -> None:
        """Closes the sessions that are remembered, then the streams, then the channels, in bounded time."""
        if self._loop is None:
            self.is_closed = True
            return
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(self._loop))
        await asyncio.shield(self._closing)  # where the caller is cancelled, it goes on

    async def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        deadline = loop.time() + min(self.default_timeout.seconds, _MAX_CLOSING_SECONDS)
        self._mover.stop()
        for session in tuple(self._sessions):
            self.carry_out(close_quietly(session))
        while self._under_way and (seconds_left := deadline - loop.time()) > 0:
            await asyncio.wait(self._under_way, timeout=seconds_left)
        for task in self._under_way:
            task.cancel()
        self.is_closed = True
        for attachment in list(self.attachments):
            attachment.client_closed()
        await asyncio.gather(*(replica.close(deadline) for replica in self._replicas.values()))

    def _carried_out(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits has been told

    def _meet(self, targets: Sequence[str]) -> None:
        is_new = False
        for target in targets:
            if target not in self._replicas:
                transport = Transport(target, self._tls, self._metadata, self.addresses.authority)
                self._replicas[target] = Replica(transport, self._replica_changed)
                is_new = True
        if is_new and len(self._replicas) > 1:
            self._mover.begin()

    def _replica_changed(self, replica: Replica) -> None:
        if replica.is_up:
            self._lookups.clear()  # it may have been replaced by one with other models and limits
        if self._closing is None:
            self._mover.begin(looks_again=not replica.is_up and self.addresses.can_change)

    async def _get_model(self, model: str) -> ServedModel:
        request = GetModelRequest(name=model)
        seconds_left = self.default_timeout.seconds
        response = await self.call_once(
            self.any_replica(0), lambda transport: transport.models.GetModel, request, seconds_left
        )
        info, limits = ModelInfo.from_message(response.model), ServerLimits.from_message(response.limits)
        return ServedModel(info, limits, self.max_kept_tokens)


async def close_quietly(session: AsyncSession) -> None:
    """Closes a session that nobody can be told about any more."""
    with contextlib.suppress(CellserveError):
        await session.close()
