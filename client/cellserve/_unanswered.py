"""Holds the requests of one stream that have no answer yet, and gives each what the server's events say about it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from cellserve._blocks import Answers, Block
from cellserve._info import durability_name
from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec
from cellserve._results import join_results
from cellserve._runs import Run, fail_run
from cellserve._status import event_error, is_passing, lost_error, reason_name
from cellserve.columns import read_column
from cellserve.errors import CellserveError, PositionGap, StaleHandle, TimedOut

__all__ = ["Opened", "Order", "ProtocolError", "Unanswered"]

T = TypeVar("T")

# Makes the exception for a request whose stream has ended, out of its number and the id of its session.
_MakeError: TypeAlias = Callable[[int, str], CellserveError]


class ProtocolError(Exception):
    """The server said something that makes no sense here; the stream cannot be trusted any more."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What an opened event says about one session."""

    session_id: str
    handle: int
    position: int
    epoch: int
    created: bool
    durability: str
    durable_position: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Order(Generic[T]):
    """An open, close or detach that has no answer yet. is_new: an open of a session that nobody else can know of."""

    request: int
    session_id: str
    deadline: float
    answer: asyncio.Future[T]
    is_new: bool = False


class Unanswered:
    """The requests on their way, and the sessions that the stream holds.

    is_draining: whether the server has said that it will stop. unwanted_handles: of sessions that were created
    when nobody waited for them any more.
    """

    def __init__(self) -> None:
        self.ledger_by_handle: dict[int, Ledger] = {}
        self.is_draining = False
        self.unwanted_handles: list[int] = []
        self.runs: dict[int, Run] = {}
        self.blocks: list[Block] = []
        self.opens: dict[int, Order[Opened]] = {}
        self.orders: dict[int, Order[None]] = {}  # closes and detaches

    def receive(self, response: Any) -> None:
        """Gives every event of a frame, a `columns.StreamResponse`, to whom it concerns. Raises ProtocolError."""
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
                durable = event.durable
                for handle, position in zip(_u64(durable.handles), _u64(durable.positions), strict=True):
                    if (ledger := self.ledger_by_handle.get(handle)) is not None:
                        ledger.is_durable_at(position)
            elif kind == "ended":
                self._take_ended(event.ended)
            elif kind == "draining":
                self.is_draining = True

    def oldest(self) -> tuple[int, int] | None:
        """The request that has waited longest, and how much of its answer has come; None where none waits."""
        heads = [next(iter(of_kind)) for of_kind in (self.runs, self.opens, self.orders) if of_kind]
        heads += [block.first_request for block in self.blocks[:1]]
        if not heads:
            return None
        request = min(heads)
        run = self.runs.get(request)
        if run is not None:
            return request, len(run.parts or ())
        return request, sum(block.num_answered for block in self.blocks[:1] if request in block)

    def end(self, make_error: _MakeError, first_unsent_request: int, *, is_final: bool) -> None:
        """The stream has ended: strands the runs, or fails them where that is final, and fails everything else."""
        runs = list(self.runs.values())
        self.runs.clear()
        blocks, self.blocks = self.blocks, []
        for block in blocks:
            runs += block.break_up()
        runs.sort(key=attrgetter("request"))  # in the order in which they were asked for
        ledgers = {id(ledger): ledger for ledger in self.ledger_by_handle.values()}
        self.ledger_by_handle.clear()
        for run in runs:
            ledgers[id(run.ledger)] = run.ledger
            run.was_sent |= run.request < first_unsent_request
            if is_final or run.ledger.owner is None:
                run.ledger.adopts_position |= run.was_sent
                fail_run(run, make_error(run.request, run.ledger.session_id))
            else:
                run.ledger.strand(run)
        for ledger in ledgers.values():
            ledger.detach()
            trouble = make_error(first_unsent_request, ledger.session_id)
            if ledger.owner is not None:
                ledger.owner.stream_lost(trouble)
        orders: list[Order[Opened] | Order[None]] = [*self.opens.values(), *self.orders.values()]
        self.opens.clear()
        self.orders.clear()
        for order in orders:
            _fail_order(order, make_error(order.request, order.session_id))

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
        orders: list[Order[Opened] | Order[None]] = [*self.opens.values(), *self.orders.values()]
        for order in orders:
            if order.deadline <= now:
                _fail_order(order, _timed_out("the request", order.session_id))
            elif not order.answer.done():
                next_deadline = min(next_deadline, order.deadline)
        return to_withdraw, next_deadline

    def _take_answers(self, event: Any) -> None:
        if self.blocks or event.counts or event.remaining:
            self._take_long_answers(event)
            return
        # The hot path: one token in every row, of single steps alone.
        runs = self.runs
        columns = None
        for row, (request, position) in enumerate(zip(_u64(event.requests), _u64(event.positions), strict=True)):
            run = runs.pop(request, None)
            if run is None:
                raise ProtocolError(f"an answer to request {request}, which is not open")
            if columns is None:
                columns = run.spec.read(event.outputs)
            ledger = run.ledger
            if ledger.is_watched or type(token := run.column) is not int:
                ledger.answered(position, run.column, run.answer_bytes)
            else:  # the same, without the call
                ledger.position = position
                ledger.num_unanswered -= 1
                ledger.unanswered_bytes -= run.answer_bytes
                if ledger.keep_token is not None:
                    ledger.keep_token(token)
            answer = run.answer
            if not answer.done():
                result = columns.result(position, row, row + 1)
                answer.set_result(result if run.parts is None else join_results([*run.parts, result]))

    def _take_long_answers(self, event: Any) -> None:
        if not event.requests:
            return
        answers = Answers.read(event, self._spec_of(int(read_column(event.requests, "<u8")[0])))
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
            run.ledger.answered(position, run.column, run.answer_bytes)
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

    def _take_failures(self, event: Any) -> None:
        columns = (
            _u32(event.codes),
            event.reasons,
            _u64(event.positions),
            _u32(event.retry_after_milliseconds),
            event.messages,
        )
        for request, *facts in zip(_u64(event.requests), *columns, strict=True):
            if request == 0:
                raise ProtocolError(f"the server could not read a frame: {event_error(*facts)}")
            self._fail(request, event_error(*facts))

    def _fail(self, request: int, error: CellserveError) -> None:
        run = self.runs.pop(request, None)
        if run is not None:
            self._fail_run(run, error)
            return
        order = self.opens.pop(request, None) or self.orders.pop(request, None)
        if order is not None:
            _fail_order(order, error)
            return
        for block in self.blocks:
            if request in block:
                self._fail_run(block.take_out(request), error)
        self.blocks = [block for block in self.blocks if not block.is_finished]

    def _take_opened(self, event: Any) -> None:
        handles, positions, epochs = _u64(event.handles), _u64(event.positions), _u64(event.epochs)
        durable_positions = _u64(event.durable_positions)
        for row, request in enumerate(_u64(event.requests)):
            opened = Opened(
                session_id=event.session_ids[row],
                handle=handles[row],
                position=positions[row],
                epoch=epochs[row],
                created=event.created[row],
                durability=durability_name(event.durabilities[row]) if event.durabilities else "none",
                durable_position=durable_positions[row] if durable_positions else None,
            )
            order = self.opens.pop(request, None)
            if order is not None and not order.answer.done():
                order.answer.set_result(opened)
            elif opened.created and (order is None or order.is_new):
                self.unwanted_handles.append(opened.handle)

    def _take_done(self, event: Any) -> None:
        for request in _u64(event.requests):
            order = self.orders.pop(request, None)
            if order is not None and not order.answer.done():
                order.answer.set_result(None)

    def _take_ended(self, event: Any) -> None:
        for handle, reason in zip(_u64(event.handles), event.reasons, strict=True):
            ledger = self.ledger_by_handle.pop(handle, None)
            if ledger is None:
                continue
            name = reason_name(reason) or "SESSION_CLOSED"
            if name == "STALE_HANDLE" and ledger.owner is not None:
                ledger.detach()
                ledger.owner.stream_lost(lost_error(name, ledger.session_id))
            else:
                ledger.lose(name)

    def _fail_run(self, run: Run, error: CellserveError) -> None:
        ledger = run.ledger
        error = ledger.why(error)
        if run.answer.done():
            fail_run(run, error)
            return
        can_pass = is_passing(error) or isinstance(error, StaleHandle)
        if ledger.owner is not None and (can_pass or (ledger.stranded and isinstance(error, PositionGap))):
            # It has not run, and can run when the session is attached again.
            ledger.strand(run)
            if can_pass:
                if ledger.handle is not None:
                    self.ledger_by_handle.pop(ledger.handle, None)
                ledger.detach()
                ledger.owner.stream_lost(error)
            return
        fail_run(run, error)


def _u64(column: bytes) -> list[int]:
    numbers: list[int] = read_column(column, "<u8").tolist()
    return numbers


def _u32(column: bytes) -> list[int]:
    numbers: list[int] = read_column(column, "<u4").tolist()
    return numbers


def _fail_order(order: Order[Opened] | Order[None], error: CellserveError) -> None:
    if not order.answer.done():
        error.session_id = order.session_id
        order.answer.set_exception(error)


def _timed_out(what: str, session_id: str | None) -> TimedOut:
    return TimedOut(f"{what} was not answered within its timeout", session_id=session_id)
