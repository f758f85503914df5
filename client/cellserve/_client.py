"""The asynchronous client: what it knows of a server, and the sessions that it opens there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from cellserve._hub import Hub
from cellserve._identity import make_id
from cellserve._info import ModelInfo, SessionInfo
from cellserve._many import step_many
from cellserve._opening import DurabilityName, OpenModeName, open_all
from cellserve._outputs import At
from cellserve._results import StepManyResult
from cellserve._session import AsyncSession
from cellserve._tokens import Tokens, Vectors
from cellserve._transport import Metadata, Tls
from cellserve.v1.model_service_pb2 import ListModelsRequest
from cellserve.v1.session_service_pb2 import CloseSessionRequest, ListSessionsRequest

if TYPE_CHECKING:
    import grpc

__all__ = ["AsyncClient", "DurabilityName", "OpenModeName"]

_PAGE_SIZE: Final = 1000


class AsyncClient:
    """A client of one server, or of several that share a state store.

    Use it in one event loop, as `async with AsyncClient(target) as client`. Whatever breaks between it and the
    servers, and whichever of them dies and comes back, calls go on where they were until their timeout passes.

    target: "host:port", or any gRPC target; "dns:///name:port" for all the addresses that a name has, or a
    sequence of "host:port", among which the sessions are spread. tls: None for a plain connection, True for TLS
    with the system's roots, a Tls, or credentials of gRPC. metadata: pairs that travel with every call.
    timeout_seconds: for every call that is given no other. max_kept_tokens: of a session that a store makes
    durable, how many tokens this client keeps until they are safe there; a step waits while there are more.
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
        self._hub = Hub(target, tls, metadata, timeout_seconds, max_kept_tokens)

    @property
    def target(self) -> str:
        """The server's address, as it was given; several are joined by commas."""
        return self._hub.addresses.name

    async def ping(self, *, timeout_seconds: float | None = None) -> float:
        """Ask whether the server serves; returns the seconds there and back. Raises Unavailable where it does not."""
        return await self._hub.ping(self._hub.deadline(timeout_seconds))

    async def models(self, *, timeout_seconds: float | None = None) -> list[ModelInfo]:
        """The models served, by name."""
        response = await self._hub.call(
            lambda transport: transport.models.ListModels, ListModelsRequest(), self._hub.deadline(timeout_seconds)
        )
        return [ModelInfo.from_message(model) for model in response.models]

    async def sessions(self, model: str | None = None, *, timeout_seconds: float | None = None) -> list[SessionInfo]:
        """The open sessions of a model, or of all, whoever opened them; by id. Replicas of one store tell the same."""
        deadline = self._hub.deadline(timeout_seconds)
        request = ListSessionsRequest(model=model or "", page_size=_PAGE_SIZE)
        sessions: list[SessionInfo] = []
        while True:
            response = await self._hub.call(lambda transport: transport.sessions.ListSessions, request, deadline)
            sessions += [SessionInfo.from_message(session) for session in response.sessions]
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    async def evict_session(self, id: str, *, timeout_seconds: float | None = None) -> int:  # noqa: A002
        """End somebody's session, as an operator: returns its last position.

        Whoever holds it, or asks for it in the time after, gets SessionEvicted. Accepted runs are finished before.
        Raises SessionNotFound and its kin.
        """
        request = CloseSessionRequest(request_id=make_id(), session_id=id, evict=True)
        deadline = self._hub.deadline(timeout_seconds)
        response = await self._hub.call(lambda transport: transport.sessions.CloseSession, request, deadline)
        return response.position

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

        id: None for a new one, under an id of its own. state: an exported state to begin with.
        keep: whether the session stays open when this client leaves it; by default where it has been given an
        id. durability: what a crash of the server may cost a new session. Raises ModelNotFound,
        SessionExists, SessionNotFound and its kin for mode "attach", SessionLimit, StateMismatch, NoStore.
        """
        if id == "":
            raise ValueError("an id of a session has at least one character; without one, pass none")
        sessions = await open_all(
            self._hub,
            model,
            1 if id is None else [id],
            None if state is None else [state],
            mode=mode,
            keep=id is not None if keep is None else keep,
            durability=durability,
            deadline=self._hub.deadline(timeout_seconds),
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
        num_sessions = count_or_ids if isinstance(count_or_ids, int) else len(count_or_ids)
        if not isinstance(count_or_ids, int) and ("" in count_or_ids or len(set(count_or_ids)) != num_sessions):
            raise ValueError("ids of sessions are all different, and have at least one character")
        if states is not None and len(states) != num_sessions:
            raise ValueError(f"{num_sessions} sessions need as many states, not {len(states)}")
        return await open_all(
            self._hub,
            model,
            count_or_ids,
            states,
            mode=mode,
            keep=not isinstance(count_or_ids, int) if keep is None else keep,
            durability=durability,
            deadline=self._hub.deadline(timeout_seconds),
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
            sessions,
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
