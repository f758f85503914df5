"""The unary calls and Generate of the scripted server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from cellserve.v1 import model_service_pb2 as models
from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.model_service_pb2_grpc import ModelServiceServicer
from cellserve.v1.session_service_pb2_grpc import SessionServiceServicer
from cellserve.v1.stream_pb2 import Durability
from cellserve.v1.values_pb2 import SessionState
from tests.client.scripted_sessions import VOCABULARY, RefusedError, Row, Session, Sessions, sampled

if TYPE_CHECKING:
    from tests.client.scripted_server import ScriptedServer

MODEL = "scripted"
CODES = {
    "SESSION_MOVED": grpc.StatusCode.ABORTED,
    "SESSION_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "ANSWER_NOT_HELD": grpc.StatusCode.ABORTED,
    "POSITION_GAP": grpc.StatusCode.FAILED_PRECONDITION,
    "POSITION_CONFLICT": grpc.StatusCode.FAILED_PRECONDITION,
    "SESSION_BUSY": grpc.StatusCode.FAILED_PRECONDITION,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "STORE_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "INVALID_INPUT": grpc.StatusCode.INVALID_ARGUMENT,
}


class ModelCalls(ModelServiceServicer):
    """One model, and the server's limits."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    def _model(self) -> models.Model:
        return models.Model(
            name=MODEL,
            version=1,
            cell="gru",
            num_layers=1,
            hidden_size=1,
            state_size=1,
            tokens=models.TokenInput(vocab_size=VOCABULARY),
            output_size=VOCABULARY,
        )

    def _limits(self) -> models.ServerLimits:
        server = self._server
        return models.ServerLimits(
            max_run_tokens=server.max_run_tokens,
            max_session_pending_tokens=4096,
            max_message_bytes=1 << 20,
            max_answer_bytes=1 << 20,
            max_open_sessions=1000,
            max_held_answers=server.max_held_answers,
            max_held_answer_bytes=server.max_held_answer_bytes,
            max_checkpoints=4,
        )

    async def LoadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def UnloadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> models.ListModelsResponse:  # noqa: N802
        await _begin(self._server, "ListModels", context)
        return models.ListModelsResponse(models=[self._model()], limits=self._limits())

    async def GetModel(self, request: Any, context: Any) -> models.GetModelResponse:  # noqa: N802
        await _begin(self._server, "GetModel", context)
        return models.GetModelResponse(model=self._model(), limits=self._limits())


class SessionCalls(SessionServiceServicer):
    """The unary calls, and Generate."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    async def Stream(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._server.serve_stream(request_iterator, context)

    async def _call(self, name: str, request: Any, context: Any, act: Callable[[Sessions], Any]) -> Any:
        server = self._server
        await _begin(server, name, context)
        request_id = getattr(request, "request_id", "")
        try:
            server.check_refusal(name)
            if request_id in server.store.answers:
                response = server.store.answers[request_id]
            else:
                response = act(server.sessions)
                if request_id:
                    server.store.answers[request_id] = response
        except RefusedError as refused:
            await _abort(context, refused)
        if (code := server.point(f"after {name}")) is not None:
            await context.abort(code, "told to")
        return response

    async def OpenSessions(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def GetSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def Step(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def ListSessions(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            found = sorted(sessions.resident.values(), key=lambda session: session.id)
            listed = [
                pb.Session(
                    id=session.id,
                    model=MODEL,
                    position=session.position,
                    durability=Durability.ValueType(session.durability),
                    generating=session.is_generating,
                    checkpoints=[
                        pb.Checkpoint(name=name, position=len(tokens)) for name, tokens in session.row.marks.items()
                    ],
                )
                for session in found
            ]
            return pb.ListSessionsResponse(sessions=listed, total_size=len(listed))

        return await self._call("ListSessions", request, context, act)

    async def ForkSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            origin, store = sessions.find(request.session_id), sessions.store
            if request.fork_session_id in sessions.resident or request.fork_session_id in store.rows:
                raise RefusedError("SESSION_EXISTS")
            fork = Session(request.fork_session_id, Row(tokens=list(origin.row.tokens)), origin.durability)
            sessions.resident[fork.id] = fork
            sessions.save(fork)
            return pb.ForkSessionResponse(session_id=fork.id, position=fork.position, epoch=1)

        return await self._call("ForkSession", request, context, act)

    async def ResetSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            sessions.replace(session, [], request.holder)
            self._server.tell_stale(session)
            return pb.ResetSessionResponse(epoch=session.row.epoch)

        return await self._call("ResetSession", request, context, act)

    async def ImportSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            sessions.replace(session, list(request.state.values), request.holder)
            self._server.tell_stale(session)
            return pb.ImportSessionResponse(epoch=session.row.epoch, position=session.position)

        return await self._call("ImportSession", request, context, act)

    async def RollbackSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            if request.name not in session.row.marks:
                raise RefusedError("CHECKPOINT_NOT_FOUND")
            sessions.replace(session, session.row.marks[request.name], request.holder)
            self._server.tell_stale(session)
            return pb.RollbackSessionResponse(epoch=session.row.epoch, position=session.position)

        return await self._call("RollbackSession", request, context, act)

    async def CheckpointSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            session.row.marks[request.name] = list(session.row.tokens)
            sessions.save(session)
            return pb.CheckpointSessionResponse(position=session.position)

        return await self._call("CheckpointSession", request, context, act)

    async def ExportSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            if session.is_generating:
                raise RefusedError("SESSION_BUSY")
            return pb.ExportSessionResponse(
                state=SessionState(format=1, position=session.position, values=bytes(session.row.tokens))
            )

        return await self._call("ExportSession", request, context, act)

    async def CloseSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        def act(sessions: Sessions) -> Any:
            session = sessions.find(request.session_id)
            sessions.end(session, "SESSION_CLOSED")
            return pb.CloseSessionResponse(position=session.position)

        return await self._call("CloseSession", request, context, act)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        server = self._server
        await _begin(server, "Generate", context)
        try:
            server.check_refusal("Generate")
            session = server.sessions.find(request.session_id)
            if session.is_generating:
                raise RefusedError("SESSION_BUSY")
            if session.position < request.position:
                raise RefusedError("POSITION_GAP", session.position)
        except RefusedError as refused:
            await _abort(context, refused)
        if request.max_tokens > server.max_held_answers:
            # Each token is an answer here: what runs further ahead of the client than this is not told again.
            server.mistakes.append(AssertionError(f"a generate of {request.max_tokens} tokens"))
        session.is_generating = True
        try:
            for number in range(request.max_tokens):
                await server.may_generate.wait()
                position = request.position + number
                token = sampled(request.seed, session.row.tokens[:position])
                if position == session.position:
                    session.row.tokens.append(token)
                assert session.row.tokens[position] == token
                if (code := server.point(f"token {position}")) is not None:
                    if code == grpc.StatusCode.OK:
                        return
                    await context.abort(code, "told to")
                is_stop = token in request.stop_tokens
                is_last = is_stop or number == request.max_tokens - 1
                code = server.point("after last token") if is_last else None
                stop, length = pb.FinishReason.FINISH_REASON_STOP, pb.FinishReason.FINISH_REASON_LENGTH
                going_on = pb.FinishReason.FINISH_REASON_UNSPECIFIED
                yield pb.GenerateResponse(
                    tokens=[token],
                    position=position + 1,
                    seed=request.seed,
                    finish_reason=(stop if is_stop else length) if is_last and code is None else going_on,
                )
                if code is not None and code != grpc.StatusCode.OK:
                    await context.abort(code, "told to")
                if is_last:
                    return
        finally:
            session.is_generating = False


async def _begin(server: ScriptedServer, name: str, context: Any) -> None:
    server.seen.append(name)
    if (code := server.point(name)) is not None:
        await context.abort(code, "told to")


async def _abort(context: Any, refused: RefusedError) -> None:
    detail = AnyMessage()
    metadata = {"position": str(refused.position)} if refused.position else {}
    detail.Pack(ErrorInfo(domain="cellserve", reason=refused.name, metadata=metadata))
    code = CODES.get(refused.name, grpc.StatusCode.NOT_FOUND)
    status = Status(code=code.value[0], message=refused.name, details=[detail])
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(code, refused.name)
