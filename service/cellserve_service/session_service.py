"""The servicer of SessionService's unary calls and of Generate: requests in, commands to the engine, answers out."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1 import stream_pb2, values_pb2
from cellserve_service import messages
from cellserve_service.decoding import decode_outputs, decode_vectors
from cellserve_service.encoding import encode_outputs
from cellserve_service.errors import Refusal, invalid
from cellserve_service.generation import MAX_STOP_TOKENS, MAX_TOKENS
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import InitialState, SessionFacts, SessionTarget, Tier
from cellserve_service.new_sessions import check_session_id
from cellserve_service.outputs import OutputArrays
from cellserve_service.state_format import MAX_POSITION, decode_state, encode_state
from cellserve_service.status import abort
from cellserve_service.stepping import IntArray
from cellserve_service.unary import UnaryCalls

MAX_PAGE_SIZE = 10000
DEFAULT_PAGE_SIZE = 100

_TIERS = {
    Tier.DEVICE: pb.Tier.TIER_DEVICE,
    Tier.HOST: pb.Tier.TIER_HOST,
    Tier.STORE: pb.Tier.TIER_STORE,
}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Answer = TypeVar("Answer", bound=Message)


class SessionServicer:
    """Every method takes its request and answers, or ends the call with the refusal it met."""

    def __init__(self, new_calls: Callable[[], UnaryCalls], limits: EngineLimits) -> None:
        self._new_calls = new_calls
        self._calls = new_calls()
        self._generating: set[UnaryCalls] = set()
        self._limits = limits

    def fail_all(self, refusal: Refusal) -> None:
        """Answer every call that waits with a refusal."""
        for calls in (self._calls, *self._generating):
            calls.fail_all(refusal)

    async def open_sessions(self, request: pb.OpenSessionsRequest, context: Context) -> pb.OpenSessionsResponse:
        async def call() -> pb.OpenSessionsResponse:
            number = self._number_to_open(request)
            states = [_state(state) for state in request.states] or None
            if states is not None and len(states) != number:
                raise invalid(f"there are {len(states)} states for {number} sessions", "states")
            opened = await self._calls.ask(
                lambda asked: messages.OpenSessions(
                    stream=self._calls.stream,
                    requests=np.full(number, asked, np.uint64),
                    model=request.model,
                    session_ids=list(request.session_ids) or None,
                    mode=request.mode,
                    durability=request.durability,
                    states=states,
                    all_or_none=True,
                    attach=False,
                    request_id=request.request_id,
                    request_digest=_digest(request),
                )
            )
            assert isinstance(opened, messages.Opened)
            return pb.OpenSessionsResponse(
                session_ids=opened.session_ids,
                positions=opened.positions.tolist(),
                epochs=opened.epochs.tolist(),
                created=opened.created.tolist(),
            )

        return await self._answer(context, request, call)

    def _number_to_open(self, request: pb.OpenSessionsRequest) -> int:
        if bool(request.session_ids) == bool(request.count):
            raise invalid("give session_ids or count, and not both", "count")
        number = len(request.session_ids) or request.count
        most = self._limits.max_open_sessions
        if number > most:
            raise invalid(f"{number} sessions in one call; at most {most}", "count")
        if request.mode == stream_pb2.OpenMode.OPEN_MODE_RESUME:
            raise invalid("a session is resumed on a stream", "mode")
        if request.count and request.mode == stream_pb2.OpenMode.OPEN_MODE_ATTACH:
            raise invalid("attaching needs session_ids", "session_ids")
        return number

    async def get_session(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        async def call() -> pb.GetSessionResponse:
            listed = await self._ask_of(request, messages.GetSession)
            assert isinstance(listed, messages.SessionsListed)
            return pb.GetSessionResponse(session=_session(listed.sessions[0]))

        return await self._answer(context, request, call)

    async def list_sessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        async def call() -> pb.ListSessionsResponse:
            if request.page_size > MAX_PAGE_SIZE:
                raise invalid(f"page_size is {request.page_size}; at most {MAX_PAGE_SIZE}", "page_size")
            listed = await self._calls.ask(
                lambda asked: messages.ListSessions(
                    stream=self._calls.stream,
                    request=asked,
                    model=request.model,
                    after=request.page_token,
                    page_size=request.page_size or DEFAULT_PAGE_SIZE,
                )
            )
            assert isinstance(listed, messages.SessionsListed)
            return pb.ListSessionsResponse(
                sessions=[_session(facts) for facts in listed.sessions],
                next_page_token=listed.sessions[-1].session_id if listed.more else "",
                total_size=listed.total_size,
            )

        return await self._answer(context, request, call)

    async def reset_session(self, request: pb.ResetSessionRequest, context: Context) -> pb.ResetSessionResponse:
        async def call() -> pb.ResetSessionResponse:
            done = await self._ask_of(request, messages.ResetSessions)
            assert isinstance(done, messages.Done)
            return pb.ResetSessionResponse(epoch=int(done.epochs[0]))

        return await self._answer(context, request, call)

    async def fork_session(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        async def call() -> pb.ForkSessionResponse:
            if request.fork_session_id:
                malformed = check_session_id(request.fork_session_id)
                if malformed is not None:
                    raise malformed
            forked = await self._ask_of(
                request, lambda target: messages.ForkSession(target, request.fork_session_id or None)
            )
            assert isinstance(forked, messages.SessionForked)
            return pb.ForkSessionResponse(session_id=forked.session_id, position=forked.position, epoch=forked.epoch)

        return await self._answer(context, request, call)

    async def close_session(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        async def call() -> pb.CloseSessionResponse:
            done = await self._ask_of(request, lambda target: messages.CloseSessions(target, request.evict))
            assert isinstance(done, messages.Done)
            return pb.CloseSessionResponse(position=int(done.positions[0]))

        return await self._answer(context, request, call)

    async def export_session(self, request: pb.ExportSessionRequest, context: Context) -> pb.ExportSessionResponse:
        async def call() -> pb.ExportSessionResponse:
            exported = await self._ask_of(request, messages.ExportSession)
            assert isinstance(exported, messages.StateExported)
            return pb.ExportSessionResponse(state=encode_state(exported.state))

        return await self._answer(context, request, call)

    async def import_session(self, request: pb.ImportSessionRequest, context: Context) -> pb.ImportSessionResponse:
        async def call() -> pb.ImportSessionResponse:
            if not request.HasField("state"):
                raise invalid("the state is missing", "state")
            state = _state(request.state)
            done = await self._ask_of(request, lambda target: messages.ImportSession(target, state))
            assert isinstance(done, messages.Done)
            return pb.ImportSessionResponse(position=int(done.positions[0]), epoch=int(done.epochs[0]))

        return await self._answer(context, request, call)

    async def checkpoint_session(
        self, request: pb.CheckpointSessionRequest, context: Context
    ) -> pb.CheckpointSessionResponse:
        async def call() -> pb.CheckpointSessionResponse:
            _check_mark_name(request.name)
            done = await self._ask_of(request, lambda target: messages.CheckpointSession(target, request.name))
            assert isinstance(done, messages.Done)
            return pb.CheckpointSessionResponse(position=int(done.positions[0]))

        return await self._answer(context, request, call)

    async def rollback_session(
        self, request: pb.RollbackSessionRequest, context: Context
    ) -> pb.RollbackSessionResponse:
        async def call() -> pb.RollbackSessionResponse:
            _check_mark_name(request.name)
            done = await self._ask_of(request, lambda target: messages.RollbackSession(target, request.name))
            assert isinstance(done, messages.Done)
            return pb.RollbackSessionResponse(position=int(done.positions[0]), epoch=int(done.epochs[0]))

        return await self._answer(context, request, call)

    async def step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        async def call() -> pb.StepResponse:
            runs = self._runs(request, context)
            answers = await self._calls.ask_all(runs)
            slices = [answer for answer in answers if isinstance(answer, messages.Answers)]
            return pb.StepResponse(
                position=int(slices[-1].positions[0]),
                outputs=encode_outputs(OutputArrays.concatenate([answer.outputs for answer in slices])),
            )

        return await self._answer(context, request, call)

    def _runs(self, request: pb.StepRequest, context: Context) -> Callable[[int], messages.SubmitRuns]:
        _check_given(request.session_id)
        kind = request.WhichOneof("input")
        if kind is None:
            raise invalid("the run has no tokens and no vectors", "tokens")
        tokens = vectors = None
        if kind == "tokens":
            tokens = np.fromiter(request.tokens.ids, np.uint32, len(request.tokens.ids))
            count = len(tokens)
        else:
            vectors = decode_vectors(request.vectors, None, "vectors")
            count = len(vectors)
        outputs = decode_outputs(request.outputs)
        remaining = context.time_remaining()
        return lambda asked: messages.SubmitRuns(
            streams=np.array([self._calls.stream]),
            requests=np.array([asked], np.uint64),
            handles=None,
            session_ids=[request.session_id],
            counts=np.array([count], np.int64),
            tokens=tokens,
            vectors=vectors,
            positions=_position(request),
            timeouts_seconds=None if remaining is None else np.array([max(remaining, 1e-6)]),
            acknowledged=None,
            outputs=outputs,
            max_output_bytes=self._limits.max_answer_bytes,
        )

    async def generate(self, request: pb.GenerateRequest, context: Context) -> None:
        try:
            # A stream of its own, so that a reader who is slow makes nobody else's generate rest.
            with self._more_calls() as calls:
                command = _generate(request, calls.stream)
                async with aclosing(calls.answers(command)) as answers:
                    async for event in answers:
                        assert isinstance(event, messages.Generated)
                        await context.write(_generated(event, request.logprobs))
        except Refusal as refusal:
            await abort(context, refusal, request)

    @contextmanager
    def _more_calls(self) -> Iterator[UnaryCalls]:
        calls = self._new_calls()
        self._generating.add(calls)
        try:
            yield calls
        finally:
            self._generating.remove(calls)
            calls.close()

    async def _ask_of(self, request: Any, command: Callable[[SessionTarget], messages.Command]) -> messages.Event:
        """Ask the engine something about the request's session. Raises Refusal."""
        _check_given(request.session_id)
        return await self._calls.ask(
            lambda asked: command(
                SessionTarget(
                    self._calls.stream,
                    np.array([asked], np.uint64),
                    session_ids=[request.session_id],
                    request_id=getattr(request, "request_id", ""),
                    request_digest=_digest(request),
                    holder=getattr(request, "holder", 0),
                )
            )
        )

    async def _answer(self, context: Context, request: Message, call: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            return await call()
        except Refusal as refusal:
            await abort(context, refusal, request)


def _digest(request: Any) -> bytes:
    """What tells a repeat from another call under the same request id."""
    if not getattr(request, "request_id", ""):
        return b""
    asked = type(request).__name__.encode() + request.SerializeToString(deterministic=True)
    return hashlib.sha256(asked).digest()


def _check_given(session_id: str) -> None:
    if not session_id:
        raise invalid("the session id is missing", "session_id")


def _check_mark_name(name: str) -> None:
    refusal = check_session_id(name)
    if refusal is not None:
        message = f"{name[:128]!r} names no checkpoint: 1 to 128 characters out of A-Z, a-z, 0-9, '.', '_', ':', '-'"
        raise invalid(message, "name")


def _generate(request: pb.GenerateRequest, stream: int) -> Callable[[int], messages.SubmitGenerate]:
    """The command of a Generate. Raises Refusal."""
    temperature = request.temperature if request.HasField("temperature") else 1.0
    top_p = request.top_p if request.HasField("top_p") else 1.0
    seed = request.seed if request.HasField("seed") else secrets.randbits(64)
    _check_given(request.session_id)
    if not 1 <= request.max_tokens <= MAX_TOKENS:
        raise invalid(f"max_tokens is {request.max_tokens}; 1 to {MAX_TOKENS} can be asked for", "max_tokens")
    if not (0.0 <= temperature < np.inf):
        raise invalid(f"temperature is {temperature}; it must be finite and at least 0", "temperature")
    if not (0.0 < top_p <= 1.0):
        raise invalid(f"top_p is {top_p}; it must be above 0 and at most 1", "top_p")
    if len(request.stop_tokens) > MAX_STOP_TOKENS:
        raise invalid(f"there are {len(request.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS}", "stop_tokens")
    if request.position > MAX_POSITION:
        raise invalid(f"position {request.position} is out of range", "position")
    position = request.position if request.HasField("position") else None
    return lambda asked: messages.SubmitGenerate(
        stream=stream,
        request=asked,
        session_id=request.session_id,
        position=position,
        max_tokens=request.max_tokens,
        temperature=temperature,
        top_k=request.top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=tuple(sorted(set(request.stop_tokens))),
    )


def _generated(event: messages.Generated, logprobs: bool) -> pb.GenerateResponse:
    response = pb.GenerateResponse(tokens=event.tokens.tolist(), position=event.position, seed=event.seed)
    if logprobs:
        response.logprobs.CopyFrom(
            values_pb2.FloatBlock(shape=[len(event.logprobs)], values=event.logprobs.astype("<f4").tobytes())
        )
    if event.finished:
        response.finish_reason = (
            pb.FinishReason.FINISH_REASON_STOP if event.stopped else pb.FinishReason.FINISH_REASON_LENGTH
        )
    return response


def _state(message: values_pb2.SessionState | bytes) -> InitialState:
    state = decode_state(message)
    if isinstance(state, Refusal):
        raise state
    return state


def _position(request: pb.StepRequest) -> IntArray | None:
    if not request.HasField("position"):
        return None
    if request.position > MAX_POSITION:
        raise invalid(f"position {request.position} is out of range", "position")
    return np.array([request.position], np.int64)


def _session(facts: SessionFacts) -> pb.Session:
    return pb.Session(
        id=facts.session_id,
        model=facts.model,
        model_version=facts.model_version,
        position=facts.position,
        epoch=facts.epoch,
        num_pending_tokens=facts.num_pending_tokens,
        durability=facts.durability,
        durable_position=facts.durable_position,
        tier=_TIERS[facts.tier],
        generating=facts.generating,
        checkpoints=[pb.Checkpoint(name=name, position=position) for name, position in facts.marks],
        attached=facts.attached,
        idle_seconds=facts.idle_seconds,
        age_seconds=facts.age_seconds,
    )
