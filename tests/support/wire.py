"""What a test over the wire needs of a server: channel, stubs, streams, and sessions followed by the oracle."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from cellserve.v1.model_service_pb2_grpc import ModelServiceStub
from cellserve.v1.session_service_pb2 import (
    CloseSessionRequest,
    ExportSessionRequest,
    ListSessionsRequest,
    OpenSessionsRequest,
    OpenSessionsResponse,
    StepRequest,
    StepResponse,
    TokenColumn,
)
from cellserve.v1.session_service_pb2_grpc import SessionServiceStub
from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve.v1.values_pb2 import OutputRequest, SessionState
from tests.support.oracle import Oracle, Trace
from tests.support.refusals import Refused
from tests.support.server import ServerProcess
from tests.support.stream import Answer, Opened, RawStream, Tokens, float_block, outputs

__all__ = ["LONG", "SMALL_WINDOW", "Follower", "Wire", "state_values"]

# Half a second of pycode. Source, because the model forgets what it read of it: on aaaa... rounding errors add up.
LONG = Path(textwrap.__file__).read_bytes()[:2048]
Options: TypeAlias = Sequence[tuple[str, int]]

# For readers who do not read: otherwise gRPC takes megabytes for them.
SMALL_WINDOW: Options = (("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0))

# float32 against float64 over some dozens of steps of cells that forget.
TOLERANCE = 2e-5


@cache
def _oracle(directory: Path) -> Oracle:
    return Oracle(directory)


@cache
def _trace(directory: Path, tokens: bytes) -> Trace:
    return _oracle(directory).run(tokens)


def state_values(state: SessionState) -> NDArray[np.float32]:
    """The numbers of an exported state: (L, state_size)."""
    return np.frombuffer(state.values, "<f4").reshape(state.num_layers, state.state_size)


class Wire:
    """One channel to a server; a context manager that closes the streams and sessions that it opened."""

    def __init__(self, server: ServerProcess, options: Options = ()) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.target, [("grpc.max_receive_message_length", -1), *options])
        self.sessions = SessionServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self._session_ids: list[str] = []
        self._streams: list[RawStream] = []
        self._stack = ExitStack()

    def stream(self) -> RawStream:
        """A new stream on the channel."""
        stream = self._stack.enter_context(RawStream(self.channel))
        self._streams.append(stream)
        return stream

    def other(self, options: Options = ()) -> Wire:
        """A second connection to the same server."""
        own_connection = ("grpc.use_local_subchannel_pool", 1)
        return self._stack.enter_context(Wire(self.server, [own_connection, *options]))

    def oracle(self, model: str, version: int = 1) -> Oracle:
        assert self.server.models is not None
        return _oracle(self.server.models / model / str(version))

    def trace(self, model: str, tokens: bytes) -> Trace:
        """The oracle's account of some tokens from position 0; remembered, for long runs are slow in float64."""
        assert self.server.models is not None
        return _trace(self.server.models / model / "1", tokens)

    def open(
        self,
        model: str,
        session_ids: Sequence[str] | int = 1,
        mode: str = "ATTACH_OR_CREATE",
        durability: str = "UNSPECIFIED",
        **more: Any,
    ) -> OpenSessionsResponse:
        """A unary OpenSessions."""
        which: dict[str, Any] = {"count": session_ids} if isinstance(session_ids, int) else {"session_ids": session_ids}
        request = OpenSessionsRequest(
            model=model,
            mode=OpenMode.Value(f"OPEN_MODE_{mode}"),
            durability=Durability.Value(f"DURABILITY_{durability}"),
            **which,
            **more,
        )
        opened = self.sessions.OpenSessions(request, timeout=30)
        self._session_ids += opened.session_ids
        return opened

    def step(
        self, session_id: str, tokens: Tokens, wanted: OutputRequest | None = None, position: int | None = None
    ) -> StepResponse:
        """A unary Step."""
        return self.sessions.Step(step_request(session_id, tokens, wanted, position), timeout=30)

    def raw_call(self, method: str, request: bytes) -> bytes:
        """A unary call of SessionService with any bytes as its request."""
        call = self.channel.unary_unary(
            f"/cellserve.v1.SessionService/{method}", request_serializer=bytes, response_deserializer=bytes
        )
        return call(request, timeout=30)

    def state(self, session_id: str) -> SessionState:
        """The session's state, exported."""
        return self.sessions.ExportSession(ExportSessionRequest(session_id=session_id), timeout=30).state

    @contextmanager
    def unmoved(self, session_id: str) -> Iterator[None]:
        """What happens inside does not move the session's state: not one bit, nor its position."""
        before = self.state(session_id)
        yield
        assert self.state(session_id) == before

    def disconnect(self) -> None:
        """Let streams and connection go, and leave the sessions as they are."""
        with self.channel:
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.channel:
            self._stack.__exit__(kind, error, trace)
            if self.server.process is None or self.server.process.poll() is not None:
                return
            if kind is not None:
                return  # what is wrong with the server should be told, and not what that does to the tidying up
            ours = {*self._session_ids, *(key for stream in self._streams for key in stream.account.session_ids)}
            listed = self.sessions.ListSessions(ListSessionsRequest(page_size=10_000), timeout=30)
            for session in listed.sessions:
                if session.id in ours:
                    self.sessions.CloseSession(CloseSessionRequest(session_id=session.id), timeout=30)


def step_request(
    session_id: str, tokens: Tokens, wanted: OutputRequest | None = None, position: int | None = None
) -> StepRequest:
    """The request of a unary Step."""
    request = StepRequest(session_id=session_id, position=position, outputs=wanted)
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind == "f":
        request.vectors.CopyFrom(float_block(tokens))
    else:
        request.tokens.CopyFrom(TokenColumn(ids=[int(token) for token in tokens]))
    return request


class Follower:
    """A session on a stream, every state of which is compared with the oracle's."""

    def __init__(self, wire: Wire, stream: RawStream, model: str = "tiny-gru", **more: Any) -> None:
        self.wire = wire
        self.stream = stream
        self.model = model
        self.oracle = wire.oracle(model)
        self.attach(stream.open(model, **more))
        self.tokens: list[Any] = []

    def attach(self, opened: Opened) -> None:
        """Go on with what an open, an attach or a reset told."""
        self.id, self.handle = opened.session_id, opened.handle

    @property
    def position(self) -> int:
        return len(self.tokens)

    def trace(self) -> Trace:
        """The oracle's account of everything that the session has consumed."""
        return self.oracle.run(self.tokens)

    def consumed(self, tokens: Tokens) -> None:
        """Tokens that the session has consumed by other ways."""
        self.tokens += list(tokens)

    def step(self, tokens: Tokens) -> Answer:
        """Run tokens from where the session stands; the states at every token must be the oracle's."""
        return self.take(tokens, self.stream.run([self.handle], [tokens], outputs(states=True))[0])

    def take(self, tokens: Tokens, request: int) -> Answer:
        """Wait for the answer of a run that asked for states at every token, and check it."""
        return self.check_answer(tokens, self.stream.answer(request))

    def check_answer(self, tokens: Tokens, answer: Answer) -> Answer:
        """The answer of a run that asked for states at every token is the oracle's."""
        self.consumed(tokens)
        assert answer.position == self.position
        expected = self.trace().states[-len(tokens) :]
        np.testing.assert_allclose(answer.outputs["states"], expected, rtol=0, atol=TOLERANCE)
        return answer

    def check(self) -> None:
        """The exported state is the oracle's, too."""
        state = self.wire.state(self.id)
        assert state.position == self.position
        if self.tokens:
            np.testing.assert_allclose(state_values(state), self.trace().states[-1], rtol=0, atol=TOLERANCE)
        else:
            assert not state_values(state).any()

    def refuse(self, tokens: Tokens, wanted: OutputRequest | None = None, position: int | None = None) -> Refused:
        """Send a run that must be refused, without having moved the state."""
        with self.wire.unmoved(self.id):
            return self.stream.refuse(self.handle, tokens, wanted, position)

    def refuse_handle(self, handle: int, tokens: Tokens) -> Refused:
        """Send a run under another handle, which must be refused, and must not move this session's state."""
        with self.wire.unmoved(self.id):
            return self.stream.refuse(handle, tokens)

    def restart(self, handle: int) -> None:
        """The session has been reset; it goes on at position 0 under a new handle."""
        self.handle = handle
        self.tokens = []
