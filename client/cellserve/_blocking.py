"""The blocking client: the asynchronous one, run on a thread, under the same names.

Nothing is decided here. Each method runs its namesake of the asynchronous class, with the same arguments and
the same documentation; the decorators say what becomes of its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, Self, TypeVar

from cellserve._client import AsyncClient
from cellserve._generation import AsyncGeneration
from cellserve._info import ModelInfo
from cellserve._portal import Portal
from cellserve._session import AsyncSession
from cellserve._transport import Metadata, Tls

if TYPE_CHECKING:
    import grpc

__all__ = ["Client", "Generation", "Session"]

P = ParamSpec("P")
T = TypeVar("T")
WrappedT = TypeVar("WrappedT")


class _Face(Protocol[WrappedT]):
    """What stands before an asynchronous object."""

    _portal: Portal
    _wrapped: WrappedT


def _blocking(
    method: Callable[Concatenate[WrappedT, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Face[WrappedT], P], T]:
    """Waits for the result."""

    @functools.wraps(method)
    def call(self: _Face[WrappedT], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.run(method(self._wrapped, *args, **kwargs))

    return call


def _opening(
    method: Callable[Concatenate[WrappedT, P], Coroutine[Any, Any, AsyncSession]],
) -> Callable[Concatenate[_Face[WrappedT], P], Session]:
    """Waits for a session."""

    @functools.wraps(method)
    def call(self: _Face[WrappedT], /, *args: P.args, **kwargs: P.kwargs) -> Session:
        return Session(self._portal, self._portal.run(method(self._wrapped, *args, **kwargs)))

    return call


def _opening_many(
    method: Callable[Concatenate[WrappedT, P], Coroutine[Any, Any, list[AsyncSession]]],
) -> Callable[Concatenate[_Face[WrappedT], P], list[Session]]:
    """Waits for sessions."""

    @functools.wraps(method)
    def call(self: _Face[WrappedT], /, *args: P.args, **kwargs: P.kwargs) -> list[Session]:
        sessions = self._portal.run(method(self._wrapped, *args, **kwargs))
        return [Session(self._portal, session) for session in sessions]

    return call


def _entering(
    method: Callable[Concatenate[WrappedT, P], AbstractAsyncContextManager[AsyncSession]],
) -> Callable[Concatenate[_Face[WrappedT], P], AbstractContextManager[Session]]:
    """Enters and leaves with a session."""

    @contextmanager
    def call(self: _Face[WrappedT], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Session]:
        context = method(self._wrapped, *args, **kwargs)
        with ExitStack() as stack:
            session = self._portal.run(context.__aenter__())
            stack.push(lambda *error: self._portal.run(context.__aexit__(*error)))
            yield Session(self._portal, session)

    return functools.wraps(method)(call)


def _stepping_many(
    method: Callable[Concatenate[WrappedT, Sequence[AsyncSession], P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Face[WrappedT], Sequence[Session], P], T]:
    """Waits for the result of a method that takes sessions."""

    @functools.wraps(method)
    def call(self: _Face[WrappedT], sessions: Sequence[Session], /, *args: P.args, **kwargs: P.kwargs) -> T:
        wrapped = [session._wrapped for session in sessions]
        return self._portal.run(method(self._wrapped, wrapped, *args, **kwargs))

    return call


def _generating(
    method: Callable[Concatenate[WrappedT, P], AsyncGeneration],
) -> Callable[Concatenate[_Face[WrappedT], P], Generation]:
    """Iterates without await."""

    @functools.wraps(method)
    def call(self: _Face[WrappedT], /, *args: P.args, **kwargs: P.kwargs) -> Generation:
        return Generation(self._portal, method(self._wrapped, *args, **kwargs))

    return call


class Generation:
    """The sampled tokens of AsyncSession.generate, as an iterator; see AsyncGeneration."""

    def __init__(self, portal: Portal, generation: AsyncGeneration) -> None:
        self._portal = portal
        self._wrapped = generation

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._wrapped.seed

    @property
    def finish_reason(self) -> Literal["length", "stop"] | None:
        """Why it ended; None before."""
        return self._wrapped.finish_reason

    @property
    def logprobs(self) -> list[float]:
        """One number for each token received, where asked for."""
        return self._wrapped.logprobs

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        received = self._wrapped._received
        if not received and not self._portal.run(self._wrapped._receive()):
            raise StopIteration
        return received.popleft()

    close = _blocking(AsyncGeneration.aclose)


class Session:
    """One session of a Client; see AsyncSession. Leaving its `with` closes it, or detaches where it is kept."""

    def __init__(self, portal: Portal, session: AsyncSession) -> None:
        self._portal = portal
        self._wrapped = session

    @property
    def id(self) -> str:
        """The session's id, under which it can be attached again."""
        return self._wrapped.id

    @property
    def model(self) -> ModelInfo:
        """The session's model."""
        return self._wrapped.model

    @property
    def position(self) -> int:
        """How many tokens the session has consumed, as far as answers have come."""
        return self._wrapped.position

    @property
    def epoch(self) -> int:
        """A number that grows with every attach, reset, rollback and import."""
        return self._wrapped.epoch

    @property
    def created(self) -> bool:
        """Whether the session was created, or an existing one attached."""
        return self._wrapped.created

    @property
    def durability(self) -> str:
        """What a crash of the server may cost: "none" (the state lives as long as the server), "periodic", "sync"."""
        return self._wrapped.durability

    @property
    def durable_position(self) -> int | None:
        """The newest position known to be safe in the server's state store; None without one."""
        return self._wrapped.durable_position

    step = _blocking(AsyncSession.step)
    generate = _generating(AsyncSession.generate)
    fork = _opening(AsyncSession.fork)
    export_state = _blocking(AsyncSession.export_state)
    import_state = _blocking(AsyncSession.import_state)
    reset = _blocking(AsyncSession.reset)
    checkpoint = _blocking(AsyncSession.checkpoint)
    rollback = _blocking(AsyncSession.rollback)
    detach = _blocking(AsyncSession.detach)
    close = _blocking(AsyncSession.close)
    _leave = _blocking(AsyncSession.__aexit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(kind, error, traceback)

    def __repr__(self) -> str:
        return repr(self._wrapped).replace("Async", "", 1)


class Client:
    """A client for any number of threads: `with Client(target) as client`; see AsyncClient.

    Steps that many threads ask for at the same moment travel together, as those of many coroutines do.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        tls: bool | Tls | grpc.ChannelCredentials | None = None,
        metadata: Metadata | None = None,
        timeout_seconds: float = 30.0,
        max_kept_tokens: int = 65536,
    ) -> None:
        self._wrapped = AsyncClient(
            target, tls=tls, metadata=metadata, timeout_seconds=timeout_seconds, max_kept_tokens=max_kept_tokens
        )
        self._portal = Portal()

    @property
    def target(self) -> str:
        """The server's address, as it was given; several are joined by commas."""
        return self._wrapped.target

    ping = _blocking(AsyncClient.ping)
    models = _blocking(AsyncClient.models)
    sessions = _blocking(AsyncClient.sessions)
    evict_session = _blocking(AsyncClient.evict_session)
    session = _entering(AsyncClient.session)
    open_session = _opening(AsyncClient.open_session)
    open_sessions = _opening_many(AsyncClient.open_sessions)
    step_many = _stepping_many(AsyncClient.step_many)
    _close = _blocking(AsyncClient.close)

    def close(self) -> None:
        """Close the sessions that are not kept, end the stream, and close the channel."""
        try:
            if not self._portal.is_closed:
                self._close()
        finally:
            self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
