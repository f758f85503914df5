"""A small server that speaks the contract, and does at every point what a test tells it to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio

from cellserve.v1 import stream_pb2 as stream_pb
from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from cellserve.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from cellserve.v1.stream_pb2 import Durability, Event, StreamRequest, StreamResponse
from cellserve.v1.values_pb2 import OutputAt, OutputColumns
from tests.client.scripted_calls import CODES, ModelCalls, SessionCalls
from tests.client.scripted_sessions import RefusedError, Session, Sessions, Store

_HEALTH = "grpc.health.v1.Health"
_handles = itertools.count(1000)


class Stream:
    """One stream of a client: what is to be written on it, in order; a status code ends it."""

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[StreamResponse | grpc.StatusCode] = asyncio.Queue()
        self.sessions: dict[int, Session] = {}
        self.is_broken = False

    def say(self, event: Event) -> None:
        self.outgoing.put_nowait(StreamResponse(events=[event]))

    def end(self, code: grpc.StatusCode) -> None:
        self.is_broken = True
        self.outgoing.put_nowait(code)


class ScriptedServer:
    """A server process. It can be killed and started again at the same port, with the same store or none.

    break_at: at the next of these points, the stream or call on which it happens ends with this status code: a name
    of a command or a call ("open", "run", "detach", "ForkSession"), before it takes effect, or with "after " before
    the name, when it has and is not answered. refuse: the next of these commands or calls is refused for this
    reason. may_run: while it is not set, runs are read and nothing is done about them.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.sessions = Sessions(self.store)
        self.port = 0
        self.break_at: list[tuple[str, grpc.StatusCode]] = []
        self.refuse: list[tuple[str, str]] = []
        self.seen: list[str] = []  # names of commands and calls
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.may_generate = asyncio.Event()
        self.may_generate.set()
        self.is_draining = False
        self.persists_always = False
        self.max_run_tokens = 64
        self.max_held_answers = 8
        self.max_held_answer_bytes = 1024
        self.streams: list[Stream] = []
        self.mistakes: list[AssertionError] = []  # of the client: what it should not have sent
        self._server: aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])
        add_ModelServiceServicer_to_server(ModelCalls(self), self._server)
        add_SessionServiceServicer_to_server(SessionCalls(self), self._server)
        health: Any = grpc.unary_unary_rpc_method_handler(self._check_health)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_HEALTH, {"Check": health}),))
        for _ in range(50):
            try:
                self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
                break
            except RuntimeError:
                await asyncio.sleep(0.02)  # the port of the process before is not free yet
        await self._server.start()

    async def kill(self) -> None:
        """Ends without a word; what was only in memory is gone."""
        assert self._server is not None
        server, self._server = self._server, None
        for stream in self.streams:
            stream.is_broken = True  # the dead say nothing
        self.streams.clear()
        self.sessions = Sessions(self.store)
        self.is_draining = False
        await server.stop(None)

    async def stop(self) -> None:
        if self._server is not None:
            await self.kill()

    async def restart(self) -> None:
        """Dies and comes back as a new process."""
        await self.kill()
        await self.start()

    def break_streams(self, code: grpc.StatusCode = grpc.StatusCode.INTERNAL) -> None:
        """Every stream ends; the sessions stay."""
        for stream in self.streams:
            stream.end(code)
        self.streams.clear()

    def persist(self) -> None:
        """Saves every session, and says so."""
        for session in list(self.sessions.resident.values()):
            self.persist_session(session)

    def persist_session(self, session: Session) -> None:
        self.sessions.save(session)
        if isinstance(session.stream, Stream):
            durable = stream_pb.DurableEvent(handles=[session.handle], positions=[session.durable_position])
            session.stream.say(Event(durable=durable))

    def drain(self) -> None:
        """Takes nothing more, and says so."""
        self.is_draining = True
        for stream in self.streams:
            stream.say(Event(draining=stream_pb.DrainingEvent(timeout_milliseconds=30_000)))

    def tell_stale(self, session: Session) -> None:
        """The session's epoch has changed by a unary call."""
        if isinstance(session.stream, Stream):
            ended = stream_pb.EndedEvent(handles=[session.handle], reasons=[ErrorReason.ERROR_REASON_STALE_HANDLE])
            session.stream.say(Event(ended=ended))
        session.stream, session.handle = None, 0

    def point(self, name: str) -> grpc.StatusCode | None:
        """Whether the stream or call is to break here."""
        for index, (at, code) in enumerate(self.break_at):
            if at == name:
                del self.break_at[index]
                return code
        return None

    def check_refusal(self, name: str) -> None:
        for index, (at, reason) in enumerate(self.refuse):
            if at == name:
                del self.refuse[index]
                raise RefusedError(reason)
        if self.is_draining and name in ("open", "run", "ForkSession", "Generate"):
            raise RefusedError("DRAINING")

    async def _check_health(self, _: bytes, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b"\x08\x02" if self.is_draining else b"\x08\x01"

    async def serve_stream(
        self, requests: AsyncIterator[StreamRequest], context: aio.ServicerContext[StreamRequest, StreamResponse]
    ) -> None:
        """SessionService.Stream."""
        stream = Stream()
        self.streams.append(stream)
        reader = asyncio.create_task(self._read(stream, requests))
        try:
            while True:
                item = await stream.outgoing.get()
                if isinstance(item, grpc.StatusCode):
                    if item != grpc.StatusCode.OK:
                        await context.abort(item, "told to")
                    return
                await context.write(item)
        finally:
            stream.is_broken = True
            reader.cancel()
            for session in stream.sessions.values():
                if session.stream is stream:
                    session.stream = None

    async def _read(self, stream: Stream, requests: AsyncIterator[StreamRequest]) -> None:
        try:
            async for request in requests:
                for command in request.commands:
                    await self._take(stream, command)
            stream.end(grpc.StatusCode.OK)
        except AssertionError as error:
            self.mistakes.append(error)
            raise

    async def _take(self, stream: Stream, command: stream_pb.Command) -> None:
        kind = command.WhichOneof("command")
        assert kind is not None
        body = getattr(command, kind)
        self.seen.append(kind)
        if kind == "cancel":
            return
        if kind == "acknowledge":
            for handle, position in zip(body.handles, body.positions, strict=True):
                if handle in stream.sessions:
                    self.sessions.acknowledge(stream.sessions[handle], position)
            return
        if kind == "run":
            await self.may_run.wait()
        if stream.is_broken:
            return
        if (code := self.point(kind)) is not None:
            stream.end(code)
            return
        take: dict[str, Callable[[Stream, Any], list[Event]]] = {
            "open": self._open,
            "run": self._run,
            "close": self._close,
            "detach": self._detach,
        }
        events = take[kind](stream, body)
        if (code := self.point(f"after {kind}")) is not None:
            stream.end(code)
            return
        for event in events:
            stream.say(event)

    def _open(self, stream: Stream, body: stream_pb.OpenCommand) -> list[Event]:
        events = []
        assert len(body.holders) == len(body.requests) == len(body.session_ids)
        for request, session_id, holder in zip(body.requests, body.session_ids, body.holders, strict=True):
            try:
                self.check_refusal("open")
                session, created = self.sessions.open(session_id, body.mode, body.durability, holder)
            except RefusedError as refused:
                events.append(_failure(request, refused))
                continue
            if isinstance(session.stream, Stream) and session.stream is not stream:
                ended = stream_pb.EndedEvent(handles=[session.handle], reasons=[ErrorReason.ERROR_REASON_SESSION_MOVED])
                session.stream.say(Event(ended=ended))
            session.stream, session.handle = stream, next(_handles)
            stream.sessions[session.handle] = session
            is_durable = session.durability != Durability.DURABILITY_NONE
            opened = stream_pb.OpenedEvent(
                requests=[request],
                session_ids=[session_id],
                handles=[session.handle],
                positions=[session.position],
                epochs=[session.row.epoch],
                created=[created],
                durabilities=[Durability.ValueType(session.durability)],
                durable_positions=[session.durable_position] if is_durable else [],
            )
            events.append(Event(opened=opened))
        return events

    def _held(self, stream: Stream, handle: int) -> Session:
        session = stream.sessions.get(handle)
        if session is None or session.handle != handle:
            raise RefusedError("STALE_HANDLE")
        if session.stream is not stream or self.sessions.resident.get(session.id) is not session:
            raise RefusedError("SESSION_MOVED")
        if session.durability != Durability.DURABILITY_NONE and self.store.owners.get(session.id) is not self.sessions:
            raise RefusedError("SESSION_MOVED")
        return session

    def _run(self, stream: Stream, body: stream_pb.RunCommand) -> list[Event]:
        events, token = [], 0
        counts = list(body.counts) or [1] * len(body.requests)
        for row, (request, count) in enumerate(zip(body.requests, counts, strict=True)):
            tokens = list(body.tokens[token : token + count])
            token += count
            try:
                self.check_refusal("run")
                assert 0 < count <= self.max_run_tokens
                session = self._held(stream, body.handles[row])
                self.sessions.acknowledge(session, body.acknowledged_positions[row])
                outputs = body.outputs.SerializeToString()
                answers = self.sessions.run(session, body.positions[row], tokens, outputs)
                held_bytes = sum(4 * len(held.tokens) for held in session.row.held if held.outputs)
                assert len(session.row.held) <= self.max_held_answers
                assert held_bytes <= self.max_held_answer_bytes
            except RefusedError as refused:
                events.append(_failure(request, refused))
                continue
            if self.persists_always:
                self.persist_session(session)
            rows = {
                OutputAt.OUTPUT_AT_EVERY: answers,
                OutputAt.OUTPUT_AT_LAST: answers[-1:],
            }.get(body.outputs.at, [])
            answer = stream_pb.AnswerEvent(
                requests=[request],
                positions=[body.positions[row] + count],
                counts=[count] if count != 1 else [],
                outputs=OutputColumns(next_tokens=rows),
            )
            events.append(Event(answers=answer))
        return events

    def _close(self, stream: Stream, body: stream_pb.CloseCommand) -> list[Event]:
        return self._leave(stream, body, lambda session: self.sessions.end(session, "SESSION_CLOSED"))

    def _detach(self, stream: Stream, body: stream_pb.DetachCommand) -> list[Event]:
        return self._leave(stream, body, self.sessions.save)

    def _leave(self, stream: Stream, body: Any, leave: Callable[[Session], None]) -> list[Event]:
        events = []
        for request, handle in zip(body.requests, body.handles, strict=True):
            try:
                session = self._held(stream, handle)
            except RefusedError as refused:
                events.append(_failure(request, refused))
                continue
            leave(session)
            session.stream, session.handle = None, 0
            done = stream_pb.DoneEvent(requests=[request], handles=[0], epochs=[session.row.epoch])
            events.append(Event(done=done))
        return events


def _failure(request: int, refused: RefusedError) -> Event:
    code = CODES.get(refused.name, grpc.StatusCode.NOT_FOUND)
    failure = stream_pb.FailureEvent(
        requests=[request],
        codes=[code.value[0]],
        reasons=[refused.reason],
        positions=[refused.position],
        retry_after_milliseconds=[0],
        messages=[refused.name],
    )
    return Event(failures=failure)
