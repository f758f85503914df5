"""Does what the engine asks of the state store, a batch after the other, and brings back what came of it.

Whatever is asked while a batch is under way goes into the next one: that is the group commit of `sync` sessions. Writes
go before everything else in their batch; the engine never asks for a write of a session behind something that depends
on it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.messages import Command, StoreReply, StoreTrouble
from cellserve_service.statistics import Statistics
from cellserve_service.store_requests import AskStore, StoreRequest, WriteSessions
from cellserve_service.stores.operations import ClaimAll, Load, Operation, Outcome, Save, StateStore, StoreError

# While the store does not answer: what must be done is tried again so often, and what is asked meanwhile is refused.
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
# A batch holds up everybody who shares the store; one open may bring as many by itself.
MAX_BATCH_OPERATIONS = 10_000

log = structlog.get_logger()


class Keeper:
    """The store's side of the engine; lives on the event loop."""

    def __init__(
        self,
        store: StateStore,
        post: Callable[[Command], None],
        statistics: Statistics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._post = post
        self._statistics = statistics
        self._clock = clock
        self._wall_clock = wall_clock
        self._writes: list[WriteSessions] = []
        self._asked: list[AskStore] = []
        self._something = asyncio.Event()
        self._trouble = ""

    def submit(self, requests: Sequence[StoreRequest]) -> None:
        """Take requests of the engine, in order."""
        for request in requests:
            if isinstance(request, WriteSessions):
                self._writes.append(request)
            else:
                self._asked.append(request)
        self._something.set()

    async def run(self) -> None:
        """Work until cancelled."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._something.wait()
            self._something.clear()
            writes, self._writes = self._writes, []
            asked = self._take_asked()
            try:
                await self._do(writes, asked)
            except StoreError as error:
                self._fail(str(error), writes, asked)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                self._something.set()
                continue
            pause = FIRST_PAUSE_SECONDS
            self._heal()

    def _take_asked(self) -> list[AskStore]:
        """What is asked, as much as one batch takes; the rest stays for the next one."""
        number, operations = 0, 0
        for request in self._asked:
            operations += sum(len(o.claims) if isinstance(o, ClaimAll) else 1 for o in request.operations)
            if number and operations > MAX_BATCH_OPERATIONS:
                self._something.set()
                break
            number += 1
        asked, self._asked = self._asked[:number], self._asked[number:]
        return asked

    async def _do(self, writes: Sequence[WriteSessions], asked: Sequence[AskStore]) -> None:
        begun_at = self._clock()
        saves = await asyncio.to_thread(_encode, writes) if writes else []
        operations: list[Operation] = [save for batch in saves for save in batch]
        for request in asked:
            operations += request.operations
        if not operations and self._trouble:
            operations.append(Load(""))  # which there never is: does the store answer again?
        if not operations:
            return
        outcomes = await self._store.apply(operations, now=self._wall_clock())
        ended_at = self._clock()
        if writes:
            self._statistics.checkpoint_duration.observe_one(ended_at - begun_at)
        first = 0
        for batch, write in zip(saves, writes, strict=True):
            self._reply(write, outcomes[first : first + len(batch)])
            first += len(batch)
        for request in asked:
            self._reply(request, outcomes[first : first + len(request.operations)])
            first += len(request.operations)

    def _reply(self, request: StoreRequest, outcomes: Sequence[Outcome]) -> None:
        self._post(StoreReply(partial(request.done, outcomes)))  # type: ignore[arg-type]

    def _fail(self, message: str, writes: list[WriteSessions], asked: Sequence[AskStore]) -> None:
        """What can be refused is refused; what must be done stays, before what was asked meanwhile."""
        self._statistics.store_errors += 1
        if message != self._trouble:
            log.error("store_unavailable", reason=message)
            self._trouble = message
            self._post(StoreTrouble(message))
        reason = ErrorReason.ERROR_REASON_STORE_UNAVAILABLE
        refusal = Refusal(reason, f"the state store does not answer: {message}")
        kept: list[AskStore] = []
        for request in (*asked, *self._asked):
            if request.failed is None:
                kept.append(request)
            else:
                self._post(StoreReply(partial(request.failed, refusal)))
        self._asked = kept
        self._writes = writes + self._writes

    def _heal(self) -> None:
        if self._trouble:
            log.info("store_available")
            self._trouble = ""
            self._post(StoreTrouble(""))


def _encode(writes: Sequence[WriteSessions]) -> list[list[Save]]:
    return [[Save(row) for row in write.snapshot.encode()] for write in writes]
