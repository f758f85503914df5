"""A session as its user sees it: steps it, and does with its state what can be done with a state."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from google.protobuf.message import DecodeError

from cellserve._asking import ask, call, replace
from cellserve._attachment import Attachment
from cellserve._deadline import Timeout
from cellserve._generation import AsyncGeneration, make_generate_request
from cellserve._hub import close_quietly
from cellserve._identity import make_holder, make_id
from cellserve._info import ModelInfo
from cellserve._leaving import close, detach
from cellserve._outputs import At
from cellserve._results import StepResult
from cellserve._steps import step_in_turn
from cellserve._tokens import Tokens, Vectors
from cellserve.errors import CellserveError, StateMismatch
from cellserve.v1.session_service_pb2 import (
    CheckpointSessionRequest,
    CloseSessionRequest,
    ExportSessionRequest,
    ForkSessionRequest,
    ForkSessionResponse,
    ImportSessionRequest,
    ResetSessionRequest,
    RollbackSessionRequest,
)
from cellserve.v1.values_pb2 import SessionState

__all__ = ["AsyncSession"]


class AsyncSession:
    """One session of a client: its state lives on the server, its position is known here.

    Comes from AsyncClient.session, open_session, open_sessions, or fork. Calls on it take effect in the order
    made; steps need not wait for each other's answers. Leaving its `async with` closes it, or detaches from
    it where it is kept.
    """

    def __init__(self, attachment: Attachment, *, keep: bool, created: bool) -> None:
        self._attachment = attachment
        self._hub = attachment.hub
        self._model = attachment.model
        self._ledger = attachment.ledger
        self._loop = attachment.loop
        self._keep = keep
        self._created = created
        if not keep:
            self._hub.remember(self)

    @property
    def id(self) -> str:
        """The session's id, under which it can be attached again."""
        return self._ledger.session_id

    @property
    def model(self) -> ModelInfo:
        """The session's model."""
        return self._model.info

    @property
    def position(self) -> int:
        """How many tokens the session has consumed, as far as answers have come."""
        return self._ledger.position

    @property
    def epoch(self) -> int:
        """A number that grows with every attach, reset, rollback and import."""
        return self._ledger.epoch

    @property
    def created(self) -> bool:
        """Whether the session was created, or an existing one attached."""
        return self._created

    @property
    def durability(self) -> str:
        """What a crash of the server may cost: "none" (the state lives as long as the server), "periodic", "sync"."""
        return self._ledger.durability

    @property
    def durable_position(self) -> int | None:
        """The newest position known to be safe in the server's state store; None without one."""
        return self._ledger.durable_position

    async def step(
        self,
        tokens: Tokens | Vectors,
        *,
        at: At = "every",
        next_token: bool | None = None,
        top_k: int = 0,
        logprobs: bool = False,
        outputs: bool | None = None,
        states: bool = False,
        gates: bool = False,
        timeout_seconds: float | None = None,
    ) -> StepResult:
        """Consume tokens, and return what was asked for after every one of them, the last, or none.

        tokens: for a model of tokens one id, a sequence or (n,) array of ids, or bytes where there are 256
        tokens; for a model of vectors an (n, input_size) array of floats. By default a model of tokens gives
        next_token and a model of vectors outputs. If the call is cancelled or times out before its first
        token has run, it is withdrawn; otherwise it finishes on the server, and the next call begins where it
        ends. A connection that breaks, and a server that dies and comes back, cost nothing but time.

        Raises InvalidInput, OutputUnsupported, TimedOut, ConnectionLost and StoreUnavailable where that was the
        reason until the timeout passed, and what else can befall a session; TypeError and ValueError for tokens
        that can never be right.
        """
        model = self._model
        wishes = (at, next_token, top_k, logprobs, outputs, states, gates)
        spec = model.specs.get(wishes) or model.output_spec(wishes)
        column = model.read_tokens(tokens)
        count = 1 if isinstance(column, int) else len(column)
        timeout = self._hub.default_timeout if timeout_seconds is None else Timeout(timeout_seconds)
        deadline = self._loop.time() + timeout.seconds
        ledger, conversation = self._ledger, self._attachment.conversation
        handle = ledger.handle
        if (
            not ledger.ready
            or handle is None
            or conversation is None
            or ledger.next_position + count > ledger.kept_limit
            or (count != 1 and count > model.max_run_tokens(spec))
            or (ledger.num_unanswered and not model.has_room(ledger, spec, count))
        ):
            return await step_in_turn(self._attachment, spec, column, count, timeout, deadline)
        run = conversation.send_run(ledger, handle, spec, column, count, timeout, deadline)
        try:
            return await run.answer
        except asyncio.CancelledError:
            self._attachment.give_up(run)
            raise

    async def fork(
        self,
        id: str | None = None,  # noqa: A002
        *,
        keep: bool = False,
        timeout_seconds: float | None = None,
    ) -> AsyncSession:
        """Make an independent copy of the session, under this id or one of its own.

        It closes with the client unless closed before, or kept. Raises SessionExists, SessionLimit.
        """
        deadline, attachment, fork_id = self._hub.deadline(timeout_seconds), self._attachment, id or make_id()

        def make_request() -> ForkSessionRequest:
            return ForkSessionRequest(request_id=make_id(), session_id=self.id, fork_session_id=fork_id)

        async def undo(_: ForkSessionResponse) -> None:
            request = CloseSessionRequest(request_id=make_id(), session_id=fork_id)
            await call(attachment, lambda transport: transport.sessions.CloseSession, request, deadline)

        async def make_fork() -> AsyncSession:
            response = await ask(
                attachment,
                lambda transport: transport.sessions.ForkSession,
                make_request,
                lambda response: response.position,
                deadline,
                undo,
            )
            # It is attached with its first step: to generate or to export needs no stream.
            fork = Attachment(self._hub, self._model, response.session_id, make_holder(), attachment.replica)
            fork.begin_at(response.epoch, response.position, self._ledger.durability)
            return AsyncSession(fork, keep=keep, created=True)

        async with attachment.turn("fork", deadline):
            await attachment.until_quiet(deadline)
            return await attachment.carry_out(make_fork(), "fork", deadline, close_quietly)

    async def export_state(self, *, timeout_seconds: float | None = None) -> bytes:
        """The session's state as a serialized SessionState, to be imported here or on another server of the model."""
        deadline = self._hub.deadline(timeout_seconds)
        async with self._attachment.turn("export_state", deadline):
            response = await ask(
                self._attachment,
                lambda transport: transport.sessions.ExportSession,
                lambda: ExportSessionRequest(session_id=self.id),
                lambda response: response.state.position,
                deadline,
            )
        return response.state.SerializeToString()

    async def import_state(self, state: bytes, *, timeout_seconds: float | None = None) -> None:
        """Replace the session's state, and its position, by an exported one. Raises StateMismatch."""
        deadline = self._hub.deadline(timeout_seconds)
        try:
            message = SessionState.FromString(state)
        except DecodeError:
            raise StateMismatch("this is no exported state", session_id=self.id) from None
        request = ImportSessionRequest(
            request_id=make_id(), session_id=self.id, state=message, holder=self._attachment.holder
        )
        await replace(
            self._attachment,
            "import_state",
            lambda transport: transport.sessions.ImportSession,
            request,
            lambda response: (response.epoch, response.position),
            deadline,
        )

    async def reset(self, *, timeout_seconds: float | None = None) -> None:
        """Set the state to zero, and the position to 0."""
        deadline = self._hub.deadline(timeout_seconds)
        request = ResetSessionRequest(request_id=make_id(), session_id=self.id, holder=self._attachment.holder)
        await replace(
            self._attachment,
            "reset",
            lambda transport: transport.sessions.ResetSession,
            request,
            lambda response: (response.epoch, 0),
            deadline,
        )

    async def checkpoint(self, name: str, *, timeout_seconds: float | None = None) -> int:
        """Mark the session's state under a name, to be rolled back to; returns the position that was marked.

        A name that is used again marks the newer state. A session keeps its newest marks, as many as the
        server's `max_checkpoints`. Raises InvalidInput for what is no name.
        """
        deadline = self._hub.deadline(timeout_seconds)
        attachment = self._attachment
        async with attachment.turn("checkpoint", deadline):
            await attachment.until_quiet(deadline)
            marking = ask(
                attachment,
                lambda transport: transport.sessions.CheckpointSession,
                lambda: CheckpointSessionRequest(request_id=make_id(), session_id=self.id, name=name),
                lambda response: response.position,
                deadline,
            )
            response = await attachment.carry_out(marking, "checkpoint", deadline)
        return response.position

    async def rollback(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """Set the session's state and position to what was marked; the mark stays. Raises CheckpointNotFound."""
        deadline = self._hub.deadline(timeout_seconds)
        request = RollbackSessionRequest(
            request_id=make_id(), session_id=self.id, name=name, holder=self._attachment.holder
        )
        await replace(
            self._attachment,
            "rollback",
            lambda transport: transport.sessions.RollbackSession,
            request,
            lambda response: (response.epoch, response.position),
            deadline,
        )

    def generate(
        self,
        max_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Tokens = (),
        logprobs: bool = False,
        timeout_seconds: float | None = None,
    ) -> AsyncGeneration:
        """Sample tokens on the server, which the session consumes: an asynchronous iterator of ids.

        temperature: 0 takes the likeliest. top_k, top_p: draw only from the likeliest tokens. seed: the same
        seed, position and settings give the same tokens. stop: tokens that end it, themselves included. To
        leave the loop breaks it off. timeout_seconds: for each message of the server. Raises InvalidInput,
        OutputUnsupported.
        """
        request = make_generate_request(
            self.id,
            self._model.info.vocab_size,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )
        return AsyncGeneration(self._attachment, request, self._hub.timeout(timeout_seconds).seconds)

    async def detach(self, *, timeout_seconds: float | None = None) -> None:
        """Leave the session open on the server, to be attached again by its id. This object is of no more use.

        Waits, for a few seconds at most, until the steps asked for before are answered and the state is where
        every server of the same store finds it.
        """
        if self._attachment.is_ended:
            return
        await self._leave("detached", detach(self._attachment, self._hub.deadline(timeout_seconds)))

    async def close(self, *, timeout_seconds: float | None = None) -> None:
        """End the session on the server, after the steps asked for before. Does nothing where it has ended already."""
        if self._attachment.is_ended:
            return
        await self._leave("closed", close(self._attachment, self._hub.deadline(timeout_seconds)))

    async def _leave(self, how: str, leaving: Coroutine[Any, Any, None]) -> None:
        # It goes on to its end also where the caller is cancelled: nobody can ask for it once more.
        self._hub.forget(self)
        self._attachment.end(how)
        await asyncio.shield(self._hub.carry_out(leaving))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await (self.detach() if self._keep else self.close())
        except CellserveError:
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} of {self.model.name!r} at position {self.position}>"
