"""The asynchronous client: what it knows of a server, and the sessions that it opens there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cellserve._attachment import Attachment
from cellserve._hub import Hub, close_quietly
from cellserve._info import ModelInfo, SessionInfo
from cellserve._many import step_many
from cellserve._outbox import OpenKey
from cellserve._outputs import At
from cellserve._results import StepManyResult
from cellserve._session import AsyncSession
from cellserve._tokens import Tokens, Vectors
from cellserve._transport import Metadata, Tls
from cellserve._unanswered import Opened
from cellserve.errors import Draining
from cellserve.v1.model_service_pb2 import ListModelsRequest
from cellserve.v1.session_service_pb2 import ListSessionsRequest
from cellserve.v1.stream_pb2 import Durability, OpenMode

if TYPE_CHECKING:
    import grpc

__all__ = ["AsyncClient", "DurabilityName", "OpenModeName"]

OpenModeName: TypeAlias = Literal["attach", "create", "attach_or_create"]
DurabilityName: TypeAlias = Literal["none", "periodic", "sync"]

_OPEN_MODES: Final = {
    "attach": OpenMode.OPEN_MODE_ATTACH,
    "create": OpenMode.OPEN_MODE_CREATE,
    "attach_or_create": OpenMode.OPEN_MODE_ATTACH_OR_CREATE,
}
_DURABILITIES: Final = {
    None: Durability.DURABILITY_UNSPECIFIED,
    "none": Durability.DURABILITY_NONE,
    "periodic": Durability.DURABILITY_PERIODIC,
    "sync": Durability.DURABILITY_SYNC,
}
_PAGE_SIZE: Final = 1000


class AsyncClient:
    """A client of one server. Use it in one event loop, as `async with AsyncClient(target) as client`.

    target: "host:port", or any gRPC target. tls: None for a plain connection, True for TLS with the system's
    roots, a Tls, or credentials of gRPC. metadata: pairs that travel with every call. timeout_seconds: for
    every call that is given no other.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: bool | Tls | grpc.ChannelCredentials | None = None,
        metadata: Metadata | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._hub = Hub(target, tls, metadata, timeout_seconds)

    @property
    def target(self) -> str:
        """The server's address, as it was given."""
        return self._hub.target

    async def ping(self, *, timeout_seconds: float | None = None) -> float:
        """Ask whether the server serves; returns the seconds there and back. Raises Unavailable where it does not."""
        return await self._hub.transport.check_health(self._hub.timeout(timeout_seconds).seconds)

    async def models(self, *, timeout_seconds: float | None = None) -> list[ModelInfo]:
        """The models served, by name."""
        transport = self._hub.transport
        timeout = self._hub.timeout(timeout_seconds).seconds
        response = await transport.call(transport.models.ListModels, ListModelsRequest(), timeout)
        return [ModelInfo.from_message(model) for model in response.models]

    async def sessions(self, model: str | None = None, *, timeout_seconds: float | None = None) -> list[SessionInfo]:
        """The open sessions of a model, or of all, whoever opened them; by id."""
        transport = self._hub.transport
        timeout = self._hub.timeout(timeout_seconds).seconds
        request = ListSessionsRequest(model=model or "", page_size=_PAGE_SIZE)
        sessions: list[SessionInfo] = []
        while True:
            response = await transport.call(transport.sessions.ListSessions, request, timeout)
            sessions += [SessionInfo.from_message(session) for session in response.sessions]
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    @asynccontextmanager
    async def session(
        self,
        model: str,
        *,
        id: str | None = None,  # noqa: A002
        state: bytes | None = None,
        mode: OpenModeName = "attach_or_create",
        keep: bool | None = None,
        durability: DurabilityName | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[AsyncSession]:
        """Open a session for an `async with`; see open_session. Leaving it closes the session, or detaches."""
        opened = await self.open_session(
            model,
            id=id,
            state=state,
            mode=mode,
            keep=keep,
            durability=durability,
            timeout_seconds=timeout_seconds,
        )
        async with opened as session:
            yield session

    async def open_session(
        self,
        model: str,
        *,
        id: str | None = None,  # noqa: A002
        state: bytes | None = None,
        mode: OpenModeName = "attach_or_create",
        keep: bool | None = None,
        durability: DurabilityName | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncSession:
        """Open a session: create one, or attach the one that has this id.

        id: None for a new one, under an id that the server makes. state: an exported state to begin with.
        keep: whether the session stays open when this client leaves it; by default where it has been given an
        id. durability: what a crash of the server may cost a new session. Raises ModelNotFound,
        SessionExists, SessionNotFound and its kin for mode "attach", SessionLimit, StateMismatch, NoStore,
        Draining.
        """
        if id == "":
            raise ValueError("an id of a session has at least one character; without one, pass none")
        sessions = await self._open(
            model,
            [id or ""],
            None if state is None else [state],
            mode=mode,
            keep=id is not None if keep is None else keep,
            durability=durability,
            timeout_seconds=timeout_seconds,
        )
        return sessions[0]

    async def open_sessions(
        self,
        model: str,
        count_or_ids: int | Sequence[str],
        *,
        states: Sequence[bytes] | None = None,
        mode: OpenModeName = "attach_or_create",
        keep: bool | None = None,
        durability: DurabilityName | None = None,
        timeout_seconds: float | None = None,
    ) -> list[AsyncSession]:
        """Open many sessions at once: so many new ones, or one for each id, in this order. All or none."""
        if isinstance(count_or_ids, str):
            raise TypeError("open_sessions takes a number, or a sequence of ids; for one id there is open_session")
        has_ids = not isinstance(count_or_ids, int)
        ids = [""] * count_or_ids if isinstance(count_or_ids, int) else list(count_or_ids)
        if has_ids and ("" in ids or len(set(ids)) != len(ids)):
            raise ValueError("ids of sessions are all different, and have at least one character")
        if states is not None and len(states) != len(ids):
            raise ValueError(f"{len(ids)} sessions need as many states, not {len(states)}")
        return await self._open(
            model,
            ids,
            states,
            mode=mode,
            keep=has_ids if keep is None else keep,
            durability=durability,
            timeout_seconds=timeout_seconds,
        )

    async def step_many(
        self,
        sessions: Sequence[AsyncSession],
        tokens: Tokens | Vectors,
        counts: Sequence[int] | npt.NDArray[np.integer] | None = None,
        *,
        at: At = "every",
        next_token: bool | None = None,
        top_k: int = 0,
        logprobs: bool = False,
        outputs: bool | None = None,
        states: bool = False,
        gates: bool = False,
        timeout_seconds: float | None = None,
    ) -> StepManyResult:
        """Step many sessions of one model at once, columns in and columns out; see AsyncSession.step.

        tokens: those of the first session, then those of the second, and so on. counts: how many each has;
        None: one each. Raises StepManyFailed where some sessions failed, with the answers of the others.
        """
        return await step_many(
            self._hub,
            [session._attachment for session in sessions],
            tokens,
            counts,
            (at, next_token, top_k, logprobs, outputs, states, gates),
            self._hub.timeout(timeout_seconds),
        )

    async def close(self) -> None:
        """Close the sessions that are not kept, end the stream, and close the channel. Takes a few seconds at most."""
        await self._hub.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(
        self,
        model: str,
        ids: Sequence[str],
        states: Sequence[bytes] | None,
        *,
        mode: OpenModeName,
        keep: bool,
        durability: DurabilityName | None,
        timeout_seconds: float | None,
    ) -> list[AsyncSession]:
        if mode not in _OPEN_MODES:
            raise ValueError(f"mode is one of {', '.join(_OPEN_MODES)}, not {mode!r}")
        if durability not in _DURABILITIES:
            raise ValueError(f"durability is one of none, periodic, sync, not {durability!r}")
        deadline = asyncio.get_running_loop().time() + self._hub.timeout(timeout_seconds).seconds
        served = await self._hub.look_up(model, deadline)
        connection = self._hub.connect(served.limits)
        if connection.conversation.draining_seconds is not None:
            raise Draining(
                "the server is draining and takes no new sessions",
                retry_after_seconds=connection.conversation.draining_seconds,
            )
        key = OpenKey(
            model=model,
            mode=_OPEN_MODES[mode],
            durability=_DURABILITIES[durability],
            has_ids=any(ids),
            has_states=states is not None,
        )
        answers = [
            connection.conversation.send_open(key, one, None if states is None else states[index], deadline)
            for index, one in enumerate(ids)
        ]
        sessions: list[AsyncSession] = []
        failure: BaseException | None = None
        for opened in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(opened, Opened):
                attachment = Attachment(self._hub, served, opened.session_id)
                attachment.take(connection.conversation, opened)
                sessions.append(AsyncSession(attachment, keep=keep, created=opened.created))
            elif failure is None:
                failure = opened
        if failure is None:
            return sessions
        for session in sessions:
            if session.created:
                await close_quietly(session)
            else:
                await session.detach()
        raise failure
