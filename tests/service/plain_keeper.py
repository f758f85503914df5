"""Does what an engine asks of the store as keeper.py does, but when the test says so, and with the faults it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.messages import Command, StoreReply, StoreTrouble
from cellserve_service.store_requests import AskStore, StoreRequest, WriteSessions
from cellserve_service.stores.operations import Claimed, ClaimResult, Operation, Outcome, Save
from tests.service.plain_store import PlainStore

__all__ = ["PlainKeeper"]

DOWN = "it is down"


class PlainKeeper:
    """The requests of one replica on their way: queued, then applied to the store, then answered.

    `taken` tells of claims that took a session from another replica.
    """

    def __init__(
        self, store: PlainStore, replica: int, post: Callable[[Command], None], taken: Callable[[str, int], None]
    ) -> None:
        self.replica = replica
        self.applied = 0  # batches
        self._store = store
        self._post = post
        self._taken = taken
        self._writes: list[WriteSessions] = []
        self._asked: list[AskStore] = []
        self._replies: list[Command] = []
        self._is_down = False

    @property
    def is_idle(self) -> bool:
        return not (self._writes or self._asked or self._replies)

    @property
    def has_replies(self) -> bool:
        return bool(self._replies)

    def submit(self, requests: Sequence[StoreRequest]) -> None:
        for request in requests:
            if isinstance(request, WriteSessions):
                self._writes.append(request)
            else:
                self._asked.append(request)

    def apply(self, now: float) -> None:
        """Apply all that is queued as one batch; the replies wait for `reply`."""
        assert not self._replies
        writes, asked = self._take()
        self._replies = [
            StoreReply(partial(request.done, outcomes))  # type: ignore[arg-type]
            for request, outcomes in self._do(writes, asked, now)
        ]
        if self._is_down:
            self._is_down = False
            self._replies.append(StoreTrouble(""))

    def fail(self, now: float, *, applied: bool) -> None:
        """The store did not take the batch, or took it and its answer was lost."""
        assert not self._replies
        writes, asked = self._take()
        if applied:
            self._do(writes, asked, now)
        self._is_down = True
        self._replies.append(StoreTrouble(DOWN))
        refusal = Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, DOWN)
        self._asked = [request for request in asked if request.failed is None]
        self._replies += [
            StoreReply(partial(request.failed, refusal)) for request in asked if request.failed is not None
        ]
        self._writes = list(writes)

    def reply(self) -> None:
        """Bring back what came of the last batch."""
        replies, self._replies = self._replies, []
        for reply in replies:
            self._post(reply)

    def _take(self) -> tuple[list[WriteSessions], list[AskStore]]:
        writes, asked, self._writes, self._asked = self._writes, self._asked, [], []
        return writes, asked

    def _do(
        self, writes: Sequence[WriteSessions], asked: Sequence[AskStore], now: float
    ) -> list[tuple[StoreRequest, Sequence[Outcome]]]:
        batches: list[tuple[StoreRequest, Sequence[Operation]]] = [
            *((write, [Save(row) for row in write.snapshot.encode()]) for write in writes),
            *((request, request.operations) for request in asked),
        ]
        operations = [operation for _, some in batches for operation in some]
        if not operations:
            return []
        self.applied += 1
        outcomes = self._store.apply(self.replica, operations, now=now)
        self._tell_taken(operations, outcomes)
        answered: list[tuple[StoreRequest, Sequence[Outcome]]] = []
        for request, some in batches:
            answered.append((request, outcomes[: len(some)]))
            outcomes = outcomes[len(some) :]
        return answered

    def _tell_taken(self, operations: Sequence[Any], outcomes: Sequence[Any]) -> None:
        for operation, outcome in zip(operations, outcomes, strict=True):
            if isinstance(outcome, list):
                self._tell_taken(operation.claims, outcome)
            elif isinstance(outcome, Claimed) and outcome.result is ClaimResult.TAKEN:
                self._taken(operation.session_id, outcome.epoch)
