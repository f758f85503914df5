"""Takes the events of a stream apart and settles the requests that they answer, checking each against the contract."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import AnswerEvent, Durability, OpenedEvent, StreamResponse
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputColumns, OutputRequest
from tests.support import refusals
from tests.support.refusals import Refused

__all__ = ["Account", "Answer", "Done", "Ended", "Opened", "Outcome", "unpack"]

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Opened:
    """One row of an OpenedEvent."""

    session_id: str
    handle: int
    position: int
    epoch: int
    created: bool
    durable_position: int | None  # None where the server has no store
    durability: str


@dataclass
class Answer:
    """All slices of the answer of one run. outputs: arrays by column name, over the whole run."""

    position: int = 0
    num_tokens: int = 0
    num_slices: int = 0
    outputs: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """One row of a DoneEvent."""

    handle: int
    epoch: int


@dataclass(frozen=True)
class Ended:
    """A session that the stream lost, or the notice that the server drains (handle 0)."""

    handle: int
    reason: str


@dataclass(frozen=True)
class _Run:
    num_tokens: int
    outputs: OutputRequest


Outcome: TypeAlias = Opened | Answer | Refused | Done


def unpack(columns: OutputColumns, num_rows: int, top_k: int) -> dict[str, Array]:
    """The columns that are present, as arrays with one row for each output row."""
    arrays: dict[str, Array] = {}
    if columns.next_tokens:
        arrays["next_tokens"] = np.array(columns.next_tokens)
    if columns.top_tokens:
        arrays["top_tokens"] = np.array(columns.top_tokens).reshape(-1, top_k)
    for name in ("top_logprobs", "logprobs", "head_outputs", "states", "gates"):
        if columns.HasField(name):
            block: FloatBlock = getattr(columns, name)
            arrays[name] = np.frombuffer(block.values, "<f4").reshape(tuple(block.shape))
    for name, array in arrays.items():
        assert len(array) == num_rows, f"{name} has {len(array)} rows; {num_rows} were told of"
    return arrays


class Account:
    """What was asked on a stream, and what came back."""

    def __init__(self) -> None:
        self.unanswered: set[int] = {0}  # request 0 stands for frames that cannot be decoded
        self.order: list[int] = []  # requests in the order in which their answers were complete
        self.losses: deque[Ended] = deque()
        self.lost_handles: set[int] = set()
        self.session_ids: list[str] = []
        self.drain_timeout_milliseconds: int | None = None
        self.durable_positions: dict[int, int] = {}  # by handle, as told last
        self._runs: dict[int, _Run] = {}
        self._partial: dict[int, Answer] = {}
        self._outcomes: dict[int, deque[Outcome]] = {}

    def expect(self, requests: list[int]) -> None:
        """Requests that are being sent."""
        self.unanswered.update(requests)

    def expect_run(self, request: int, num_tokens: int, outputs: OutputRequest) -> None:
        """A run that is being sent."""
        self.unanswered.add(request)
        self._runs[request] = _Run(num_tokens, outputs)

    def outcome(self, request: int) -> Outcome | None:
        """What has answered a request, once."""
        outcomes = self._outcomes.get(request)
        return outcomes.popleft() if outcomes else None

    def has_begun(self, request: int) -> bool:
        """Whether the first slices of an answer have come, and not yet the last."""
        return request in self._partial

    def take(self, frame: StreamResponse) -> None:
        for event in frame.events:
            self._take(event.WhichOneof("event"), event)

    def _settle(self, request: int, outcome: Outcome) -> None:
        assert request in self.unanswered, f"request {request} was not asked, or was answered before"
        if request:
            self.unanswered.remove(request)
        self._outcomes.setdefault(request, deque()).append(outcome)
        self.order.append(request)

    def _take(self, kind: str | None, event: Any) -> None:
        match kind:
            case "opened":
                for request, opened in _opened_rows(event.opened):
                    self.session_ids.append(opened.session_id)
                    self.durable_positions[opened.handle] = opened.durable_position or 0
                    self._settle(request, opened)
            case "answers":
                self._take_answers(event.answers)
            case "failures":
                for request, refused in refusals.of_rows(event.failures):
                    self._settle(request, refused)
            case "done":
                columns = (event.done.requests, event.done.handles, event.done.epochs)
                for request, handle, epoch in zip(*columns, strict=True):
                    self.durable_positions[handle] = -1
                    self._settle(request, Done(handle, epoch))
            case "ended":
                for handle, reason in zip(event.ended.handles, event.ended.reasons, strict=True):
                    name = ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
                    assert handle not in self.lost_handles, "a session was lost twice"
                    self.lost_handles.add(handle)
                    self.losses.append(Ended(handle, name))
            case "durable":
                for handle, position in zip(event.durable.handles, event.durable.positions, strict=True):
                    assert position > self.durable_positions[handle], "a durable position sank, or was told again"
                    self.durable_positions[handle] = position
            case "draining":
                self.drain_timeout_milliseconds = event.draining.timeout_milliseconds
            case _:
                raise AssertionError(f"an event that nobody expects here: {event}")

    def _take_answers(self, event: AnswerEvent) -> None:
        number = len(event.requests)
        counts = list(event.counts) or [1] * number
        remaining = list(event.remaining) or [0] * number
        num_rows = [
            _num_output_rows(self._runs[request].outputs.at, count, left)
            for request, count, left in zip(event.requests, counts, remaining, strict=True)
        ]
        top_ks = {self._runs[request].outputs.top_k for request in event.requests}
        assert len(top_ks) == 1, "runs of one answer event have asked for different outputs"
        arrays = unpack(event.outputs, sum(num_rows), top_ks.pop())
        first = 0
        columns = (event.requests, event.positions, counts, remaining, num_rows)
        for request, position, count, left, rows in zip(*columns, strict=True):
            answer = self._partial.setdefault(request, Answer())
            assert request in self.unanswered, f"request {request} was not asked, or was answered before"
            assert not answer.num_slices or position == answer.position + count
            answer.position = position
            answer.num_tokens += count
            answer.num_slices += 1
            for name, array in arrays.items():
                known = answer.outputs.get(name, array[:0])
                answer.outputs[name] = np.concatenate((known, array[first : first + rows]))
            first += rows
            assert answer.num_tokens + left == self._runs[request].num_tokens
            if not left:
                self._settle(request, self._partial.pop(request))


def _num_output_rows(at: int, count: int, left: int) -> int:
    if at == OutputAt.OUTPUT_AT_EVERY:
        return count
    return int(at == OutputAt.OUTPUT_AT_LAST and not left)


def _opened_rows(event: OpenedEvent) -> Iterator[tuple[int, Opened]]:
    columns = (
        *(event.requests, event.session_ids, event.handles, event.positions, event.epochs, event.created),
        event.durable_positions or [None] * len(event.requests),
        event.durabilities,
    )
    for request, session_id, handle, position, epoch, created, durable, durability in zip(*columns, strict=True):
        name = Durability.Name(durability).removeprefix("DURABILITY_")
        assert name == "NONE" or (name != "UNSPECIFIED" and durable is not None and durable <= position)
        yield request, Opened(session_id, handle, position, epoch, created, durable, name)
