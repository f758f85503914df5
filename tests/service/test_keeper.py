"""The keeper before a store that a script rules: what goes into a batch, what is tried again, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cellserve_service import keeper as keeper_module
from cellserve_service.errors import Refusal
from cellserve_service.keeper import Keeper
from cellserve_service.messages import Command, StoreReply, StoreTrouble
from cellserve_service.statistics import Statistics
from cellserve_service.store_requests import AskStore, WriteSessions
from cellserve_service.stores.operations import End, Load, Loaded, Operation, Outcome, Row, Save, StoreError, Written


class ScriptedStore:
    """Answers a batch when the test lets it, with an error where there is a reason."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.batches: list[list[str]] = []  # each operation by kind and session
        self.trouble = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self._arrived = asyncio.Condition()

    async def apply(self, operations: Sequence[Operation], *, now: float) -> list[Outcome]:
        async with self._arrived:
            self.batches.append([_name(operation) for operation in operations])
            self._arrived.notify_all()
        await self.gate.wait()
        if self.trouble:
            raise StoreError(self.trouble)
        return [Loaded() if isinstance(operation, Load) else Written.WRITTEN for operation in operations]

    async def has_seen(self, number: int) -> None:
        async with self._arrived, asyncio.timeout(5):
            await self._arrived.wait_for(lambda: len(self.batches) >= number)

    async def open(self) -> None: ...

    async def watch(self, moved: Callable[[str, int], None]) -> None: ...

    async def close(self) -> None: ...


def _name(operation: Any) -> str:
    session_id = operation.row.session_id if isinstance(operation, Save) else operation.session_id
    return f"{type(operation).__name__.lower()} {session_id}"


class Snapshots:
    """What a write hands to the keeper: something that can be encoded."""

    def __init__(self, *session_ids: str) -> None:
        self._session_ids = session_ids

    def encode(self) -> list[Row]:
        return [Row(session_id, "m", 1, 0, 0, 1e9, "", b"") for session_id in self._session_ids]


class Desk:
    """A keeper at work, and what came back."""

    def __init__(self) -> None:
        self.store = ScriptedStore()
        self.statistics = Statistics()
        self.keeper = Keeper(self.store, self._take, self.statistics)
        self.heard: list[str] = []
        self._changed = asyncio.Condition()

    def _take(self, command: Command) -> None:
        if isinstance(command, StoreReply):
            command.take()
        elif isinstance(command, StoreTrouble):
            self.heard.append(f"trouble {command.message}".strip())

    def write(self, *session_ids: str) -> WriteSessions:
        snapshot: Any = Snapshots(*session_ids)
        return WriteSessions(snapshot, lambda outcomes: self.heard.append(f"saved {' '.join(session_ids)}"))

    def must(self, session_id: str) -> AskStore:
        end = End(session_id, 1, "", 0, 0.0)
        return AskStore([end], lambda outcomes: self.heard.append(f"ended {session_id}"))

    def ask(self, session_id: str) -> AskStore:
        def failed(refusal: Refusal) -> None:
            self.heard.append(f"refused {session_id}")

        return AskStore([Load(session_id)], lambda outcomes: self.heard.append(f"loaded {session_id}"), failed)

    async def hears(self, number: int) -> None:
        async with asyncio.timeout(5):
            while len(self.heard) < number:
                await asyncio.sleep(0)


@asynccontextmanager
async def at_work(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(keeper_module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(keeper_module, "LONGEST_PAUSE_SECONDS", 0.002)
    desk = Desk()
    task = asyncio.create_task(desk.keeper.run())
    try:
        yield desk
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_asked_while_a_batch_is_under_way_goes_into_the_next_one_writes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with at_work(monkeypatch) as desk:
        desk.store.gate.clear()
        desk.keeper.submit([desk.write("a")])
        await desk.store.has_seen(1)
        desk.keeper.submit([desk.ask("b"), desk.write("c", "d")])
        desk.keeper.submit([desk.must("e"), desk.write("f")])
        desk.store.gate.set()
        await desk.hears(5)
        assert desk.store.batches == [["save a"], ["save c", "save d", "save f", "load b", "end e"]]
        assert desk.heard == ["saved a", "saved c d", "saved f", "loaded b", "ended e"]


async def test_what_must_be_done_is_tried_until_it_is_and_the_rest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with at_work(monkeypatch) as desk:
        desk.store.trouble = "no disk"
        desk.keeper.submit([desk.ask("a"), desk.must("b"), desk.write("c"), desk.must("d")])
        await desk.store.has_seen(3)
        assert desk.heard == ["trouble no disk", "refused a"]
        assert desk.store.batches[1:3] == [["save c", "end b", "end d"]] * 2
        desk.keeper.submit([desk.write("e"), desk.must("f")])
        desk.store.trouble = ""
        await desk.hears(8)
        assert desk.store.batches[-1] == ["save c", "save e", "end b", "end d", "end f"]
        assert desk.heard[2:] == ["saved c", "saved e", "ended b", "ended d", "ended f", "trouble"]
        assert desk.statistics.store_errors >= 3


async def test_a_store_of_which_nothing_is_asked_is_asked_whether_it_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with at_work(monkeypatch) as desk:
        desk.store.trouble = "gone"
        desk.keeper.submit([desk.ask("a")])
        await desk.store.has_seen(3)
        assert desk.heard == ["trouble gone", "refused a"]
        desk.store.trouble = ""
        await desk.hears(3)
        assert desk.heard[2:] == ["trouble"]
        assert all(len(batch) == 1 for batch in desk.store.batches)


async def test_a_batch_has_a_bound_and_the_rest_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MAX_BATCH_OPERATIONS", 2)
    async with at_work(monkeypatch) as desk:
        desk.keeper.submit([desk.ask("a"), desk.ask("b"), desk.ask("c")])
        await desk.hears(3)
        assert desk.store.batches == [["load a", "load b"], ["load c"]]
        assert desk.heard == ["loaded a", "loaded b", "loaded c"]
