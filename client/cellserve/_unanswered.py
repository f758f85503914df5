"""Holds the requests of one stream that have no answer yet, and gives each what the server's events say about it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from cellserve._blocks import Answers, Block
from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec
from cellserve._results import StepResult, join_results
from cellserve._status import event_error, reason_name
from cellserve.errors import CellserveError, TimedOut
from cellserve.v1.stream_pb2 import (
    AnswerEvent,
    DoneEvent,
    EndedEvent,
    FailureEvent,
    OpenedEvent,
    StreamResponse,
)

__all__ = ["Done", "Opened", "Order", "ProtocolError", "Run", "Unanswered"]

T = TypeVar("T")

# Makes the exception for a request whose stream has ended, out of its number and the id of its session.
_MakeError: TypeAlias = Callable[[int, str | None], CellserveError]


class ProtocolError(Exception):
    """The server said something that makes no sense here; the stream cannot be trusted any more."""


@dataclass(slots=True, eq=False)
class Run:
    """One run of one session, until its last answer. parts: what has come of an answer in slices."""

    request: int
    ledger: Ledger
    spec: OutputSpec
    deadline: float
    answer: asyncio.Future[StepResult]
    parts: list[StepResult] | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What an opened event says about one session."""

    session_id: str
    handle: int
    position: int
    epoch: int
    created: bool
    durable_position: int | None


@dataclass(frozen=True, slots=True)
class Done:
    """What a done event says about one session. handle: the new one after a reset."""

    handle: int
    epoch: int


@dataclass(frozen=True, slots=True, eq=False)
class Order(Generic[T]):
    """An open, reset or close that has no answer yet."""

    request: int
    session_id: str | None
    deadline: float
    answer: asyncio.Future[T]


class Unanswered:
    """The requests on their way, and the sessions that the stream holds.

    draining_seconds: set once the server has said that it stops, and in how many seconds. unwanted_handles:
    of sessions that were created when nobody waited for them any more.
    """

    def __init__(self) -> None:
        self.ledger_by_handle: dict[int, Ledger] = {}
        self.draining_seconds: float | None = None
        self.unwanted_handles: list[int] = []
        self.runs: dict[int, Run] = {}
        self.blocks: list[Block] = []
        self.opens: dict[int, Order[Opened]] = {}
        self.orders: dict[int, Order[Done]] = {}  # resets and closes

    def receive(self, response: StreamResponse) -> None:
        """Gives every event of a frame to whom it concerns. Raises ProtocolError."""
        for event in response.events:
            kind = event.WhichOneof("event")
            if kind == "answers":
                self._take_answers(event.answers)
            elif kind == "failures":
                self._take_failures(event.failures)
            elif kind == "opened":
                self._take_opened(event.opened)
            elif kind == "done":
                self._take_done(event.done)
            elif kind == "durable":
                for handle, position in zip(event.durable.handles, event.durable.positions, strict=True):
                    if (ledger := self.ledger_by_handle.get(handle)) is not None:
                        ledger.durable_position = position
            elif kind == "ended":
                self._take_ended(event.ended)
            elif kind == "draining":
                self.draining_seconds = event.draining.timeout_milliseconds / 1000

    def fail_all(self, make_error: _MakeError) -> None:
        """Fails everything that waits: the stream has ended."""
        for run in self.runs.values():
            _fail_run(run, make_error(run.request, run.ledger.session_id))
        self.runs.clear()
        blocks, self.blocks = self.blocks, []
        for block in blocks:
            block.fail_all(make_error)
        for orders in (self.opens, self.orders):
            for order in orders.values():
                _fail_order(order, make_error(order.request, order.session_id))
            orders.clear()
        for ledger in self.ledger_by_handle.values():
            ledger.detach()
        self.ledger_by_handle.clear()

    def expire(self, now: float) -> tuple[list[tuple[Ledger, int]], float]:
        """Fails what has waited too long. Returns the runs to withdraw, with their sessions, and the next deadline."""
        to_withdraw: list[tuple[Ledger, int]] = []
        next_deadline = math.inf
        for run in self.runs.values():
            if run.answer.done():
                continue
            if run.deadline <= now:
                run.answer.set_exception(_timed_out("the step", run.ledger.session_id))
                run.ledger.give_up()
                to_withdraw.append((run.ledger, run.request))
            elif run.deadline < next_deadline:
                next_deadline = run.deadline
        for block in self.blocks:
            if block.answer.done():
                continue
            if block.deadline <= now:
                to_withdraw += block.expire()
            else:
                next_deadline = min(next_deadline, block.deadline)
        orders: list[Order[Opened] | Order[Done]] = [*self.opens.values(), *self.orders.values()]
        for order in orders:
            if order.deadline <= now:
                _fail_order(order, _timed_out("the request", order.session_id))
            elif not order.answer.done():
                next_deadline = min(next_deadline, order.deadline)
        return to_withdraw, next_deadline

    def _take_answers(self, event: AnswerEvent) -> None:
        if self.blocks or event.counts or event.remaining:
            self._take_long_answers(event)
            return
        # The hot path: one token in every row, of single steps alone.
        runs = self.runs
        columns = None
        for row, (request, position) in enumerate(zip(event.requests, event.positions, strict=True)):
            run = runs.pop(request, None)
            if run is None:
                raise ProtocolError(f"an answer to request {request}, which is not open")
            if columns is None:
                columns = run.spec.read(event.outputs)
            run.ledger.answered(position)
            answer = run.answer
            if not answer.done():
                result = columns.result(position, row, row + 1)
                answer.set_result(result if run.parts is None else join_results([*run.parts, result]))

    def _take_long_answers(self, event: AnswerEvent) -> None:
        if not event.requests:
            return
        answers = Answers.read(event, self._spec_of(event.requests[0]))
        is_single = np.ones(len(answers.requests), dtype=np.bool_)
        for block in self.blocks:
            is_single &= ~block.take(answers)
        self.blocks = [block for block in self.blocks if not block.is_finished]
        for row in np.flatnonzero(is_single).tolist():
            request, position = int(answers.requests[row]), int(answers.positions[row])
            run = self.runs.get(request)
            if run is None:
                raise ProtocolError(f"an answer to request {request}, which is not open")
            begin, end = int(answers.row_starts[row]), int(answers.row_starts[row + 1])
            part = answers.columns.result(position, begin, end)
            if answers.remaining[row]:
                run.parts = [*(run.parts or ()), part]
                continue
            del self.runs[request]
            run.ledger.answered(position)
            if not run.answer.done():
                run.answer.set_result(join_results([*run.parts, part]) if run.parts else part)

    def _spec_of(self, request: int) -> OutputSpec:
        run = self.runs.get(request)
        if run is not None:
            return run.spec
        for block in self.blocks:
            if request in block:
                return block.spec
        raise ProtocolError(f"an answer to request {request}, which is not open")

    def _take_failures(self, event: FailureEvent) -> None:
        columns = (
            event.codes,
            event.reasons,
            event.positions,
            event.retry_after_milliseconds,
            event.messages,
        )
        for request, *facts in zip(event.requests, *columns, strict=True):
            if request == 0:
                raise ProtocolError(f"the server could not read a frame: {event_error(*facts)}")
            self._fail(request, event_error(*facts))

    def _fail(self, request: int, error: CellserveError) -> None:
        run = self.runs.pop(request, None)
        if run is not None:
            _fail_run(run, error)
            return
        order = self.opens.pop(request, None) or self.orders.pop(request, None)
        if order is not None:
            _fail_order(order, error)
            return
        for block in self.blocks:
            if request in block:
                block.fail(request, error)
        self.blocks = [block for block in self.blocks if not block.is_finished]

    def _take_opened(self, event: OpenedEvent) -> None:
        for row, request in enumerate(event.requests):
            opened = Opened(
                session_id=event.session_ids[row],
                handle=event.handles[row],
                position=event.positions[row],
                epoch=event.epochs[row],
                created=event.created[row],
                durable_position=event.durable_positions[row] if event.durable_positions else None,
            )
            order = self.opens.pop(request, None)
            if order is not None and not order.answer.done():
                order.answer.set_result(opened)
            elif opened.created and (order is None or order.session_id is None):
                self.unwanted_handles.append(opened.handle)

    def _take_done(self, event: DoneEvent) -> None:
        for request, handle, epoch in zip(event.requests, event.handles, event.epochs, strict=True):
            order = self.orders.pop(request, None)
            if order is not None and not order.answer.done():
                order.answer.set_result(Done(handle, epoch))

    def _take_ended(self, event: EndedEvent) -> None:
        for handle, reason in zip(event.handles, event.reasons, strict=True):
            ledger = self.ledger_by_handle.pop(handle, None)
            if ledger is not None:
                ledger.lose(reason_name(reason) or "SESSION_CLOSED")


def _fail_run(run: Run, error: CellserveError) -> None:
    error = run.ledger.why(error)
    given_up = run.answer.done()
    run.ledger.failed(error, given_up=given_up)
    if not given_up:
        run.answer.set_exception(error)


def _fail_order(order: Order[Opened] | Order[Done], error: CellserveError) -> None:
    if not order.answer.done():
        error.session_id = order.session_id
        order.answer.set_exception(error)


def _timed_out(what: str, session_id: str | None) -> TimedOut:
    return TimedOut(f"{what} was not answered within its timeout", session_id=session_id)
