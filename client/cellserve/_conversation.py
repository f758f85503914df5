"""What is asked and answered on one stream, without the stream itself.

Numbers the requests, gathers them for the next frame, and matches what the server says with them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cellserve._blocks import Block, ResultBuffer
from cellserve._deadline import Timeout
from cellserve._info import ServerLimits
from cellserve._ledger import Ledger
from cellserve._outbox import OpenKey, Outbox
from cellserve._outputs import OutputSpec
from cellserve._status import connection_error
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve._unanswered import Done, Opened, Order, Run, Unanswered
from cellserve._wire import RunColumns
from cellserve.errors import CellserveError
from cellserve.v1.stream_pb2 import StreamResponse

__all__ = ["Conversation"]

T = TypeVar("T")


class Conversation:
    """The requests of one stream and the sessions that it holds. Belongs to the running event loop.

    wake: called when there is something to send, where before was nothing. on_deadline: called with a deadline
    that is earlier than `next_deadline`.
    """

    def __init__(self, limits: ServerLimits, wake: Callable[[], None], on_deadline: Callable[[float], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(limits, wake)
        self._unanswered = Unanswered()
        self._runs = self._unanswered.runs
        self._on_deadline = on_deadline
        self._next_request = 1
        self._first_unsent_request = 1
        self.next_deadline = math.inf
        self.is_ended = False
        self._stops_at: float | None = None

    @property
    def draining_seconds(self) -> float | None:
        """In how many seconds from now the server stops; None as long as it has not said so."""
        return None if self._stops_at is None else max(0.0, self._stops_at - self._loop.time())

    def send_run(
        self,
        ledger: Ledger,
        handle: int,
        spec: OutputSpec,
        column: int | TokenColumn | VectorColumn,
        count: int,
        timeout: Timeout,
        deadline: float,
    ) -> Run:
        """Asks for one run of a session that is ready; await its `answer`, and give it up if that is cancelled."""
        request = self._next_request
        self._next_request = request + 1
        run = self._runs[request] = Run(request, ledger, spec, deadline, self._loop.create_future())
        ledger.last_command = self._outbox.add_run(
            ledger.last_command,
            spec,
            request,
            handle,
            column,
            count,
            ledger.reserve(count),
            timeout.milliseconds,
            ledger.position,
        )
        if deadline < self.next_deadline:
            self._on_deadline(deadline)
        return run

    def send_block(
        self,
        ledgers: Sequence[Ledger],
        members: npt.NDArray[np.int64],
        spec: OutputSpec,
        tokens: npt.NDArray[np.uint32] | None,
        vectors: VectorColumn | None,
        counts: npt.NDArray[np.int64],
        timeout: Timeout,
        deadline: float,
        buffer: ResultBuffer,
    ) -> Block:
        """Asks for one run of each of many sessions that are ready. members: their indices in the buffer."""
        num_runs = len(ledgers)
        first_request = self._take_numbers(num_runs, deadline)
        positions = [ledger.reserve(count) for ledger, count in zip(ledgers, counts.tolist(), strict=True)]
        columns = RunColumns(
            requests=np.arange(first_request, first_request + num_runs, dtype=np.uint64),
            handles=np.array([ledger.handle for ledger in ledgers], dtype=np.uint64),
            counts=counts.astype(np.uint32),
            has_long_runs=bool((counts != 1).any()),
            tokens=tokens,
            vectors=vectors,
            positions=np.array(positions, dtype=np.uint64),
            timeouts_milliseconds=np.full(num_runs, timeout.milliseconds, dtype=np.uint32),
            acknowledged_positions=np.array([ledger.position for ledger in ledgers], dtype=np.uint64),
            outputs=spec.encoded,
        )
        command = self._outbox.add_columns(columns)
        for ledger in ledgers:
            ledger.last_command = command
        block = Block(first_request, ledgers, members, spec, deadline, buffer)
        self._unanswered.blocks.append(block)
        return block

    def send_open(self, key: OpenKey, session_id: str, state: bytes | None, deadline: float) -> asyncio.Future[Opened]:
        """Asks to open or attach one session; hold it when it is opened."""
        order: Order[Opened] = self._make_order(session_id or None, deadline)
        self._unanswered.opens[order.request] = order
        self._outbox.add_open(key, order.request, session_id, state)
        return order.answer

    def send_reset(self, ledger: Ledger, handle: int, deadline: float) -> asyncio.Future[Done]:
        """Asks to reset a session; hold it under its new handle when that is done."""
        order: Order[Done] = self._make_order(ledger.session_id, deadline)
        self._unanswered.orders[order.request] = order
        ledger.last_command = self._outbox.add_reset(ledger.last_command, order.request, handle)
        return order.answer

    def send_close(self, ledger: Ledger, handle: int, deadline: float) -> asyncio.Future[Done]:
        """Asks to end a session."""
        order: Order[Done] = self._make_order(ledger.session_id, deadline)
        self._unanswered.orders[order.request] = order
        ledger.last_command = self._outbox.add_close(ledger.last_command, order.request, handle)
        return order.answer

    def acknowledge(self, ledger: Ledger, handle: int) -> None:
        """Tells that all answers of the session have come, so that the server need not hold them."""
        ledger.last_command = self._outbox.add_acknowledge(ledger.last_command, handle, ledger.position)

    def give_up(self, run: Run) -> None:
        """Withdraws a run that nobody waits for any more, if its first token has not run."""
        if self._runs.get(run.request) is run:
            run.ledger.give_up()
            self._withdraw([(run.ledger, run.request)])

    def give_up_block(self, block: Block) -> None:
        """Withdraws the runs of a block that nobody waits for any more."""
        self._withdraw(block.give_up())

    def hold(self, ledger: Ledger, handle: int, epoch: int, position: int) -> None:
        """The session has this handle on the stream; nothing happens when the stream has ended meanwhile."""
        if self.is_ended:
            return
        self._unanswered.ledger_by_handle[handle] = ledger
        ledger.attach(handle, epoch, position)

    def release(self, ledger: Ledger) -> int | None:
        """Lets go of a session, so that events about it concern nobody. Returns its handle, if it had one."""
        handle = ledger.handle
        if handle is not None:
            self._unanswered.ledger_by_handle.pop(handle, None)
            ledger.detach()
        return handle

    def take_frames(self) -> list[bytes]:
        """What waits to be sent."""
        self._first_unsent_request = self._next_request
        return self._outbox.take()

    def receive(self, response: StreamResponse) -> None:
        """Takes a frame of the server. Raises ProtocolError."""
        self._unanswered.receive(response)
        for handle in self._unanswered.unwanted_handles:
            self._outbox.add_close(0, self._take_numbers(1, math.inf), handle)
        self._unanswered.unwanted_handles.clear()
        if self._stops_at is None and self._unanswered.draining_seconds is not None:
            self._stops_at = self._loop.time() + self._unanswered.draining_seconds

    def expire(self, now: float) -> None:
        """Fails what has waited too long, and works out the next deadline."""
        to_withdraw, self.next_deadline = self._unanswered.expire(now)
        self._withdraw(to_withdraw)

    def end(self, code: str, details: str | None) -> None:
        """The stream has ended: fails all that waits, and detaches the sessions."""

        def make_error(request: int, session_id: str | None) -> CellserveError:
            was_sent = request < self._first_unsent_request
            return connection_error(code, details, in_doubt=was_sent, session_id=session_id)

        self.is_ended = True
        self._unanswered.fail_all(make_error)

    def _make_order(self, session_id: str | None, deadline: float) -> Order[T]:
        return Order(self._take_numbers(1, deadline), session_id, deadline, self._loop.create_future())

    def _take_numbers(self, num_requests: int, deadline: float) -> int:
        if deadline < self.next_deadline:
            self._on_deadline(deadline)
        first_request = self._next_request
        self._next_request += num_requests
        return first_request

    def _withdraw(self, runs: Sequence[tuple[Ledger, int]]) -> None:
        for ledger, request in runs:
            ledger.last_command = self._outbox.add_cancel(ledger.last_command, request)
