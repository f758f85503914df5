"""One stream of columns, without a client library: sends and reads frames as arrays, many thousand sessions at once."""

from __future__ import annotations

import queue
from types import TracebackType
from typing import Any, Final, Self

import grpc
import numpy as np
import numpy.typing as npt

from cellserve.columns import StreamRequest, StreamResponse, read_column, write_column

__all__ = ["RawStream"]

_METHOD: Final = "/cellserve.v1.SessionService/Stream"
_OUTPUT_AT_LAST: Final = 2
_MODE_CREATE: Final = 2

Handles = npt.NDArray[np.uint64]


class RawStream:
    """A context manager. Frames are answered as they were sent; one that fails in part raises AssertionError."""

    def __init__(self, target: str) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(target, options)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._events: Any = None
        self._last_request = 0
        self._unanswered = 0

    def __enter__(self) -> Self:
        call = self._channel.stream_stream(_METHOD, request_serializer=bytes, response_deserializer=bytes)
        self._events = call(iter(self._frames.get, None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frames.put(None)
        self._events.cancel()
        self._channel.close()

    def open(self, model: str, number: int) -> Handles:
        """Create sessions; returns their handles: (number,)."""
        marks = write_column(np.arange(1, number + 1), "<u8")  # as our client library sends them
        self._send(number, open={"model": model, "mode": _MODE_CREATE, "holders": marks})
        handles: list[Handles] = []
        while self._unanswered:
            handles += [read_column(opened.handles, "<u8") for opened in self._read("opened")]
        return np.concatenate(handles)

    def send_runs(self, handles: Handles, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        """One token for each of many sessions, its next token asked for; what ran before is acknowledged. All (n,)."""
        self._send(
            len(handles),
            run={
                "handles": write_column(handles, "<u8"),
                "tokens": write_column(tokens, "<u4"),
                "positions": write_column(positions, "<u8"),
                "acknowledged_positions": write_column(positions, "<u8"),
                "outputs": {"at": _OUTPUT_AT_LAST, "next_token": True},
            },
        )

    def read_answers(self, most_left: int = 0) -> None:
        """Read until at most so many runs are unanswered."""
        while self._unanswered > most_left:
            self._read("answers")

    def close_sessions(self, handles: Handles) -> None:
        """Close sessions and wait until they are."""
        self._send(len(handles), close={"handles": write_column(handles, "<u8")})
        while self._unanswered:
            self._read("done")

    def _send(self, number: int, **command: dict[str, Any]) -> None:
        first = self._last_request + 1
        self._last_request += number
        self._unanswered += number
        for columns in command.values():
            columns["requests"] = write_column(np.arange(first, first + number), "<u8")
        self._frames.put(StreamRequest(commands=[command]).SerializeToString())

    def _read(self, kind: str) -> list[Any]:
        """The events of a frame, which must all be of a kind that answers requests."""
        events = StreamResponse.FromString(next(self._events)).events
        assert all(event.WhichOneof("event") == kind for event in events), events
        answers = [getattr(event, kind) for event in events]
        self._unanswered -= sum(len(answer.requests) // 8 for answer in answers)
        return answers
