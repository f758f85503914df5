"""A thin client of SessionService.Stream over plain grpc, which holds the server to the contract's wording.

It shares nothing with the client library. Every event is checked (stream_events.py): columns of equal length, each
request answered exactly once, positions that advance by the tokens answered.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from cellserve.v1.stream_pb2 import (
    AcknowledgeCommand,
    CancelCommand,
    CloseCommand,
    Command,
    DetachCommand,
    Durability,
    OpenCommand,
    OpenMode,
    ResetCommand,
    RunCommand,
    StreamRequest,
    StreamResponse,
)
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputRequest
from tests.support import refusals
from tests.support.refusals import Refused
from tests.support.stream_events import Account, Answer, Done, Ended, Opened, Outcome

__all__ = ["Answer", "Done", "Ended", "Opened", "RawStream", "Tokens", "float_block", "outputs"]

METHOD = "/cellserve.v1.SessionService/Stream"
TIMEOUT_SECONDS = 60.0

Tokens: TypeAlias = Sequence[int] | bytes | NDArray[Any]


def outputs(at: str = "every", top_k: int = 0, **wanted: bool) -> OutputRequest:
    """An OutputRequest: outputs("last", states=True)."""
    return OutputRequest(at=OutputAt.Value(f"OUTPUT_AT_{at.upper()}"), top_k=top_k, **wanted)


def float_block(values: Any) -> FloatBlock:
    """Any array as a block of float32."""
    array = np.ascontiguousarray(values, "<f4")
    return FloatBlock(shape=array.shape, values=array.tobytes())


class RawStream:
    """One stream. Reads only when asked for something; a context manager that breaks it off."""

    def __init__(self, channel: grpc.Channel, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        open_call = channel.stream_stream(
            METHOD, request_serializer=bytes, response_deserializer=StreamResponse.FromString
        )
        self._call = open_call(iter(self._frames.get, None), timeout=timeout_seconds)
        self._last_request = 0
        self.account = Account()

    # Sending.

    def new_requests(self, number: int) -> list[int]:
        """Request numbers that the stream has not used."""
        first = self._last_request + 1
        self._last_request += number
        requests = list(range(first, first + number))
        self.account.expect(requests)
        return requests

    def adopt_request(self, request: int, num_tokens: int, wanted: OutputRequest) -> int:
        """Expect the answer of a run under a request number of the test's own choice."""
        self.account.expect_run(request, num_tokens, wanted)
        return request

    def send(self, *commands: Command) -> None:
        """Send one frame."""
        self.send_bytes(StreamRequest(commands=commands).SerializeToString())

    def send_bytes(self, frame: bytes) -> None:
        self._frames.put(frame)

    def opening(
        self,
        model: str,
        session_ids: Sequence[str] | int = 1,
        mode: str = "ATTACH_OR_CREATE",
        durability: str = "UNSPECIFIED",
        **more: Any,
    ) -> tuple[Command, list[int]]:
        """An open command, and its requests."""
        ids = [] if isinstance(session_ids, int) else list(session_ids)
        requests = self.new_requests(session_ids if isinstance(session_ids, int) else len(ids))
        command = OpenCommand(
            requests=requests,
            model=model,
            session_ids=ids,
            mode=OpenMode.Value(f"OPEN_MODE_{mode}"),
            durability=Durability.Value(f"DURABILITY_{durability}"),
            **more,
        )
        return Command(open=command), requests

    def running(
        self, handles: Sequence[int], tokens: Sequence[Tokens], wanted: OutputRequest | None = None, **more: Any
    ) -> tuple[Command, list[int]]:
        """A run command with one row for each handle, and its requests."""
        requests = self.new_requests(len(handles))
        for request, row in zip(requests, tokens, strict=True):
            self.account.expect_run(request, len(row), wanted or OutputRequest())
        command = RunCommand(requests=requests, handles=handles, outputs=wanted, **more)
        if any(len(row) != 1 for row in tokens):
            command.counts.extend(len(row) for row in tokens)
        if any(isinstance(row, np.ndarray) and row.dtype.kind == "f" for row in tokens):
            command.vectors.CopyFrom(float_block(np.concatenate([np.asarray(row) for row in tokens])))
        else:
            command.tokens.extend(int(token) for row in tokens for token in row)
        return Command(run=command), requests

    def open(self, model: str, session_id: str | None = None, mode: str = "ATTACH_OR_CREATE", **more: Any) -> Opened:
        """Open one session and wait for it."""
        return self.open_many(model, 1 if session_id is None else [session_id], mode, **more)[0]

    def open_many(
        self, model: str, session_ids: Sequence[str] | int, mode: str = "ATTACH_OR_CREATE", **more: Any
    ) -> list[Opened]:
        """Open sessions and wait for all of them."""
        command, requests = self.opening(model, session_ids, mode, **more)
        self.send(command)
        return [self.opened(request) for request in requests]

    def run(
        self, handles: Sequence[int], tokens: Sequence[Tokens], wanted: OutputRequest | None = None, **more: Any
    ) -> list[int]:
        """Send runs in one frame; returns their requests."""
        command, requests = self.running(handles, tokens, wanted, **more)
        self.send(command)
        return requests

    def step(
        self, handle: int, tokens: Tokens, wanted: OutputRequest | None = None, position: int | None = None
    ) -> Answer:
        """Send one run and wait for its answer."""
        more = {} if position is None else {"positions": [position]}
        return self.answer(self.run([handle], [tokens], wanted, **more)[0])

    def refuse(
        self, handle: int, tokens: Tokens, wanted: OutputRequest | None = None, position: int | None = None
    ) -> Refused:
        """Send one run and wait for its refusal."""
        more = {} if position is None else {"positions": [position]}
        return self.refusal(self.run([handle], [tokens], wanted, **more)[0])

    def reset(self, handle: int) -> int:
        """Send a reset; returns its request."""
        requests = self.new_requests(1)
        self.send(Command(reset=ResetCommand(requests=requests, handles=[handle])))
        return requests[0]

    def close_session(self, handle: int) -> int:
        """Send a close; returns its request."""
        return self.close_sessions([handle])[0]

    def close_sessions(self, handles: Sequence[int]) -> list[int]:
        """Send closes in one frame; returns their requests."""
        requests = self.new_requests(len(handles))
        self.send(Command(close=CloseCommand(requests=requests, handles=handles)))
        return requests

    def detach(self, handle: int) -> int:
        """Send a detach; returns its request."""
        requests = self.new_requests(1)
        self.send(Command(detach=DetachCommand(requests=requests, handles=[handle])))
        return requests[0]

    def cancel(self, *runs: int) -> None:
        self.send(Command(cancel=CancelCommand(runs=runs)))

    def acknowledge(self, handle: int, position: int) -> None:
        self.send(Command(acknowledge=AcknowledgeCommand(handles=[handle], positions=[position])))

    # Waiting for what comes back.

    def outcome(self, request: int) -> Outcome:
        """Whatever answers a request."""
        while (found := self.account.outcome(request)) is None:
            self.read()
        return found

    def opened(self, request: int) -> Opened:
        found = self.outcome(request)
        assert isinstance(found, Opened), found
        return found

    def answer(self, request: int) -> Answer:
        found = self.outcome(request)
        assert isinstance(found, Answer), found
        return found

    def begun(self, request: int) -> None:
        """Wait for the first slice of an answer that comes in several: the run has begun, and is not done."""
        while not self.account.has_begun(request):
            assert request in self.account.unanswered, "the run was done too soon for this test"
            self.read()

    def refusal(self, request: int) -> Refused:
        found = self.outcome(request)
        assert isinstance(found, Refused), found
        return found

    def done(self, request: int) -> Done:
        found = self.outcome(request)
        assert isinstance(found, Done), found
        return found

    def loss(self) -> Ended:
        """The next session that the stream has lost without asking."""
        while not self.account.losses:
            self.read()
        return self.account.losses.popleft()

    def durable(self, handle: int, position: int) -> int:
        """Wait until a session is durable up to a position, or further; returns how far."""
        while (found := self.account.durable_positions[handle]) < position:
            self.read()
        return found

    def drain_notice(self) -> int:
        """Milliseconds until the server ends the stream."""
        while (timeout := self.account.drain_timeout_milliseconds) is None:
            self.read()
        return timeout

    def read(self) -> int:
        """Read one frame; returns its size in bytes. Raises EOFError or grpc.RpcError when the stream has ended."""
        frame = next(self._call, None)
        if frame is None:
            raise EOFError("the server has ended the stream")
        self.account.take(frame)
        return int(frame.ByteSize())

    def is_answered(self, request: int) -> bool:
        """Whether all of a request's answer has been read."""
        return request not in self.account.unanswered

    @property
    def lost_handles(self) -> set[int]:
        """Handles of the sessions that the stream has lost without asking, as far as it has been read."""
        return self.account.lost_handles

    def half_close(self) -> None:
        self._frames.put(None)

    def finish(self) -> grpc.StatusCode:
        """Half-close, read to the end and return the status."""
        self.half_close()
        return self.end()

    def end(self) -> grpc.StatusCode:
        """Read to the end and return the status."""
        try:
            while True:
                self.read()
        except (EOFError, grpc.RpcError):
            pass
        return self._call.code()

    def ending(self) -> Refused:
        """Read to the end, which must be an error, and return its status."""
        assert self.end() is not grpc.StatusCode.OK
        assert isinstance(self._call, grpc.RpcError)
        return refusals.of_error(self._call)

    def cut(self) -> None:
        """Break the stream off, as a lost connection does."""
        self._call.cancel()
        self._frames.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
