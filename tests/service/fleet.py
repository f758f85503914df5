"""Two engines on one state store, their streams, and the crashes of their processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from cellserve_service import messages
from cellserve_service.engine import Engine
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import Command, Event
from cellserve_service.statistics import Statistics
from cellserve_service.stores.operations import Row
from tests.service.engine_checks import check_engine, check_kept, check_nothing_left
from tests.service.plain_keeper import PlainKeeper
from tests.service.plain_store import Living, PlainStore
from tests.service.records import Record, flat_records
from tests.service.side_by_side import UNARY
from tests.support.steppers import FakeModel, FakeStepper

__all__ = ["WALL_OFFSET", "Fleet", "Listener", "Replica"]

WALL_OFFSET = 1_000_000.0

_LAST_WORDS = {"failed", "opened", "done", "exported", "forked", "listed"}

# Gets what a replica says: the record, and the handle that it tells.
Listener = Callable[["Replica", Record, int], None]


class Replica:
    """One process: an engine, its side of the store, and the streams to it."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet, self.number = fleet, number
        self.stepper = FakeStepper(fleet.model, fleet.num_slots, fleet.max_batch)
        self.engine = Engine([self.stepper], fleet.limits, Statistics(), has_store=True, wall_offset=WALL_OFFSET)
        runs = self.engine.core.served[0].runs
        for pool in (runs.requests.token_pool, runs.held_pool):
            pool.rows = pool.rows[:4]
        self.keeper = PlainKeeper(fleet.store, number, self._take_reply, fleet.note_taken(number))
        self.unanswered: set[tuple[int, int]] = set()
        self.streams: set[int] = set()
        self.is_drained = False
        self._taken: list[tuple[list[Event], list[tuple[Record, int]]]] = []

    # Asking.

    def new_stream(self) -> int:
        stream = next(self.fleet.stream_numbers)
        self.streams.add(stream)
        self.handle(messages.StartStream(stream))
        return stream

    def end_stream(self, stream: int) -> None:
        self.streams.remove(stream)
        self.unanswered = {asked for asked in self.unanswered if asked[0] != stream}
        self.handle(messages.EndStream(stream))

    def ask(self, stream: int, number: int = 1) -> list[int]:
        """New request numbers; each must be answered once."""
        requests = [next(self.fleet.numbers) for _ in range(number)]
        assert stream == UNARY or stream in self.streams
        self.unanswered |= {(stream, request) for request in requests}
        return requests

    def handle(self, command: Command) -> None:
        self.engine.handle(command, self.fleet.now)
        self._look()

    def _take_reply(self, command: Command) -> None:
        self.handle(command)

    # Turns.

    def tick(self) -> bool:
        tick = self.engine.begin_tick(self.fleet.now)
        if tick is not None:
            result: Any = self.engine.collect(tick)
            self.engine.finish_tick(tick, result, self.fleet.now)
        self._look()
        return tick is not None

    def checkpoint(self) -> None:
        self.engine.begin_checkpoint(self.fleet.now)
        while self.engine.write_due(self.fleet.now):
            pass
        self._look()

    def sweep(self) -> None:
        while self.engine.sweep(self.fleet.now):
            pass
        self._look()

    def apply(self) -> None:
        """Let the store do all that is asked of it."""
        self.keeper.apply(self.fleet.wall)
        self.fleet.check_store()

    def fail(self, *, applied: bool) -> None:
        self.keeper.fail(self.fleet.wall, applied=applied)
        self.fleet.check_store()

    def reply(self) -> None:
        self.keeper.reply()

    def settle(self) -> None:
        """Let everything come to its end, as far as the store and the ticks bring it."""
        for _ in range(1000):
            self.reply()
            busy = self.tick() or not self.keeper.is_idle
            self.apply()
            if not busy and not self.keeper.has_replies:
                return
        raise AssertionError("it goes on for ever")

    def check_nothing_left(self) -> None:
        check_nothing_left(self.engine.core)
        assert not self.unanswered, self.unanswered
        # Events are written to the wire some time later: nothing that has happened since may have changed them.
        assert all(flat_records(events) == records for events, records in self._taken)

    def _look(self) -> None:
        """Take what the engine says and asks, and give every record to those who listen."""
        self.fleet.is_sound, was_sound = False, self.fleet.is_sound
        events = self.engine.take_events()
        self.keeper.submit(self.engine.take_store_requests())
        check_engine(self.engine.core)
        check_kept(self.engine.core)
        for event in events:
            records = flat_records([event])
            self._taken.append(([event], records))
            self._give_out(records)
        self.fleet.is_sound = was_sound

    def _give_out(self, records: list[tuple[Record, int]]) -> None:
        """Let everybody hear the records of one event."""
        for record, handle in records:
            if record.kind == "drained":
                self.is_drained = True
            elif record.stream == UNARY or record.stream in self.streams:
                waits = (record.stream, record.request) in self.unanswered
                assert waits or not record.request, f"{record} is the answer of nothing that waits for one"
                for listener in self.fleet.listeners:
                    listener(self, record, handle)
        self.unanswered -= {(record.stream, record.request) for record, _ in records if _is_last(record)}


class Fleet:
    """The store, the replicas, the time."""

    def __init__(self, limits: EngineLimits, *, model: FakeModel, num_slots: int, max_batch: int) -> None:
        self.limits, self.model = limits, model
        self.num_slots, self.max_batch = num_slots, max_batch
        self.now = 0.0
        self.is_sound = True  # no check has failed
        self.store = PlainStore(limits.ended_session_memory_seconds)
        self.numbers = itertools.count(1)
        self.stream_numbers = itertools.count(UNARY + 1)
        self.listeners: list[Listener] = []
        self.row_checks: list[Callable[[Row], None]] = []
        self.notices: list[tuple[int, str, int]] = []  # replica that lost, session, epoch
        self._replica_numbers = itertools.count(101)
        self.replicas = [Replica(self, next(self._replica_numbers)) for _ in range(2)]

    def place_of(self, replica: Replica) -> int | None:
        """Which one of the two it is; None: its process is no more."""
        return self.replicas.index(replica) if replica in self.replicas else None

    @property
    def wall(self) -> float:
        return self.now + WALL_OFFSET

    def crash(self, place: int) -> None:
        """A process dies with all that it has not stored; another one begins."""
        self.replicas[place] = Replica(self, next(self._replica_numbers))

    def note_taken(self, by: int) -> Callable[[str, int], None]:
        return lambda session_id, epoch: self.notices.append((by, session_id, epoch))

    def tell_notice(self, number: int) -> None:
        """One of the notices that a session was taken over reaches the other replica."""
        by, session_id, epoch = self.notices.pop(number)
        for replica in self.replicas:
            if replica.number != by:
                replica.handle(messages.MovedAway(session_id, epoch))

    def living(self, session_id: str) -> Row | None:
        """A session as it is stored, if its time is not over."""
        found = self.store._sessions.get(session_id)
        if isinstance(found, Living) and found.row.expires_at > self.wall:
            return found.row
        return None

    def owner(self, session_id: str) -> int | None:
        """The replica that may write a session."""
        found = self.store._sessions.get(session_id)
        return None if found is None else found.replica

    def check_store(self) -> None:
        self.is_sound = False
        for found in self.store._sessions.values():
            if isinstance(found, Living):
                for check in self.row_checks:
                    check(found.row)
        self.is_sound = True


def _is_last(record: Record) -> bool:
    if record.kind == "answer":
        return record.facts[2] == 0
    if record.kind == "generated":
        return bool(record.facts[3])
    return record.kind in _LAST_WORDS
