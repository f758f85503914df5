"""What is asked and answered on one stream, without the stream itself.

Numbers the requests, gathers them for the next frame, and matches what the server says with them.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cellserve._blocks import Block, ResultBuffer
from cellserve._deadline import Timeout
from cellserve._info import ServerLimits
from cellserve._ledger import Ledger
from cellserve._outbox import OpenKey, Outbox
from cellserve._outputs import OutputSpec
from cellserve._runs import Run
from cellserve._status import connection_error
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve._unanswered import Opened, Order, Unanswered
from cellserve._wire import RunColumns
from cellserve.errors import CellserveError, ConnectionLost

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

    @property
    def is_draining(self) -> bool:
        """Whether the server has said that it will stop."""
        return self._unanswered.is_draining

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
        answer_bytes = spec.row_bytes if count == 1 else spec.answer_bytes(count)
        position = ledger.reserve(count, answer_bytes)
        run = self._runs[request] = Run(
            request, ledger, spec, column, count, position, answer_bytes, deadline, self._loop.create_future()
        )
        ledger.last_command = self._outbox.add_run(
            ledger.last_command,
            spec,
            request,
            handle,
            column,
            count,
            position,
            timeout.milliseconds,
            ledger.position,
        )
        if deadline < self.next_deadline:
            self._on_deadline(deadline)
        return run

    def send_again(self, run: Run, handle: int) -> None:
        """Asks once more for a run that was asked for on another stream, or was refused for a while."""
        ledger, now = run.ledger, self._loop.time()
        run.request = self._take_numbers(1, run.deadline)
        run.parts = None
        self._runs[run.request] = run
        ledger.last_command = self._outbox.add_run(
            ledger.last_command,
            run.spec,
            run.request,
            handle,
            run.column,
            run.count,
            run.position,
            Timeout(max(run.deadline - now, 0.001)).milliseconds,
            ledger.position,
        )

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
        positions = array("Q", [ledger.next_position for ledger in ledgers])
        columns = RunColumns(
            requests=np.arange(first_request, first_request + num_runs, dtype=np.uint64),
            handles=array("Q", [ledger.handle or 0 for ledger in ledgers]),
            counts=counts.astype(np.uint32),
            has_long_runs=bool((counts != 1).any()),
            tokens=tokens,
            vectors=vectors,
            positions=positions,
            timeouts_milliseconds=np.full(num_runs, timeout.milliseconds, dtype=np.uint32),
            acknowledged_positions=array("Q", [ledger.position for ledger in ledgers]),
            outputs=spec.encoded,
        )
        command = self._outbox.add_columns(columns)
        one_answer_bytes = spec.row_bytes
        for ledger, count in zip(ledgers, counts.tolist(), strict=True):
            # Ledger.reserve, without the call.
            ledger.next_position += count
            ledger.num_unanswered += 1
            ledger.unanswered_bytes += one_answer_bytes if count == 1 else spec.answer_bytes(count)
            ledger.last_command = command
        column = tokens if vectors is None else vectors
        assert column is not None
        block = Block(first_request, ledgers, members, spec, column, counts, positions, deadline, buffer)
        self._unanswered.blocks.append(block)
        return block

    def send_open(
        self,
        key: OpenKey,
        session_id: str,
        holder: int,
        state: bytes | None,
        deadline: float,
        *,
        is_new: bool = False,
    ) -> asyncio.Future[Opened]:
        """Asks to open or attach one session; hold it when it is opened.

        is_new: its id was made for this open, so it is closed again where nobody waits for it any more.
        """
        order: Order[Opened] = self._make_order(session_id, deadline, is_new=is_new)
        self._unanswered.opens[order.request] = order
        self._outbox.add_open(key, order.request, session_id, holder, state)
        return order.answer

    def send_close(self, ledger: Ledger, handle: int, deadline: float) -> asyncio.Future[None]:
        """Asks to end a session."""
        order: Order[None] = self._make_order(ledger.session_id, deadline)
        self._unanswered.orders[order.request] = order
        ledger.last_command = self._outbox.add_close(ledger.last_command, order.request, handle)
        return order.answer

    def send_detach(self, ledger: Ledger, handle: int, deadline: float) -> asyncio.Future[None]:
        """Gives a session up, all of whose answers have come; done when another server finds it as it is."""
        order: Order[None] = self._make_order(ledger.session_id, deadline)
        self._unanswered.orders[order.request] = order
        self._outbox.add_acknowledge(ledger.last_command, handle, ledger.position)
        ledger.last_command = self._outbox.add_detach(ledger.last_command, order.request, handle)
        return order.answer

    def give_up(self, run: Run) -> None:
        """Withdraws a run that nobody waits for any more, if its first token has not run."""
        if self._runs.get(run.request) is run:
            run.ledger.give_up()
            self._withdraw([(run.ledger, run.request)])

    def give_up_block(self, block: Block) -> None:
        """Withdraws the runs of a block that nobody waits for any more, those that have left it among them."""
        self._withdraw(block.give_up())
        for run in tuple(block.runs):
            if run.answer.cancel() and run.ledger.owner is not None:
                run.ledger.owner.give_up(run)

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

    def receive(self, response: Any) -> None:
        """Takes a frame of the server, a `columns.StreamResponse`. Raises ProtocolError."""
        self._unanswered.receive(response)
        for handle in self._unanswered.unwanted_handles:
            self._outbox.add_close(0, self._take_numbers(1, math.inf), handle)
        self._unanswered.unwanted_handles.clear()

    def oldest(self) -> tuple[int, int] | None:
        """What has waited longest for the server, as something that differs when there is progress."""
        oldest = self._unanswered.oldest()
        return None if oldest is None or oldest[0] >= self._first_unsent_request else oldest

    def expire(self, now: float) -> None:
        """Fails what has waited too long, and works out the next deadline."""
        to_withdraw, self.next_deadline = self._unanswered.expire(now)
        self._withdraw(to_withdraw)

    def end(self, code: str, details: str | None) -> None:
        """The stream has ended: strands the runs, fails everything else, and detaches the sessions."""

        def make_error(request: int, session_id: str) -> CellserveError:
            in_doubt = request < self._first_unsent_request
            return connection_error(code, details, in_doubt=in_doubt, session_id=session_id)

        self.is_ended = True
        is_final = not isinstance(make_error(1, ""), ConnectionLost)
        self._unanswered.end(make_error, self._first_unsent_request, is_final=is_final)

    def _make_order(self, session_id: str, deadline: float, *, is_new: bool = False) -> Order[T]:
        request = self._take_numbers(1, deadline)
        return Order(request, session_id, deadline, self._loop.create_future(), is_new)

    def _take_numbers(self, num_requests: int, deadline: float) -> int:
        if deadline < self.next_deadline:
            self._on_deadline(deadline)
        first_request = self._next_request
        self._next_request += num_requests
        return first_request

    def _withdraw(self, runs: Sequence[tuple[Ledger, int]]) -> None:
        for ledger, request in runs:
            ledger.last_command = self._outbox.add_cancel(ledger.last_command, request)
