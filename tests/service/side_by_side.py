"""An engine and the plain sessions side by side: their ticks, and the comparison of what they say after every step."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellserve_service.engine import Engine, Tick
from cellserve_service.generation import GenerateTick
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import Command, Event
from cellserve_service.run_tick import RunTick
from cellserve_service.statistics import Statistics
from tests.service.engine_checks import check_engine
from tests.service.plain_service import PlainService
from tests.service.plain_sessions import Grip, PlainGenerate, PlainRun, PlainSession
from tests.service.records import Record, flat_records
from tests.support.steppers import FakeModel, FakeStepper

__all__ = ["TOKENS", "UNARY", "VECTORS", "SideBySide"]

TOKENS = FakeModel()
VECTORS = FakeModel(name="vectors", vocab_size=None, input_size=2, output_size=2, gate_names=(), num_layers=1)
UNARY = 1  # the stream of unary calls: it holds no session, is told of no drain, and never ends

_LAST_WORDS = {"failed", "opened", "done", "exported", "forked", "listed"}


class SideBySide:
    """An engine on fake steppers beside the plain sessions."""

    def __init__(
        self, limits: EngineLimits | None = None, *, num_slots: int = 4, max_batch: int = 4, models: int = 2
    ) -> None:
        self.limits = limits or EngineLimits(max_sessions=8)
        self.models = [TOKENS, VECTORS][:models]
        self.steppers = [FakeStepper(model, num_slots, max_batch) for model in self.models]
        self.statistics = Statistics()
        self.engine = Engine(self.steppers, self.limits, self.statistics)
        for served in self.engine.core.served:
            # So small that they are compacted all the time.
            for pool in (served.runs.requests.token_pool, served.runs.held_pool):
                pool.rows = pool.rows[:4]
        sessions = self.engine.core.sessions
        self.plain = PlainService(self.models, self.limits, lambda session_id: sessions.row_by_id[session_id])
        self.ticks: deque[Tick] = deque()
        self.unanswered: set[tuple[int, int]] = set()
        self.said: list[Record] = []  # by the last step
        self.agrees = True  # so far
        self.num_drained = 0
        self._taken: list[tuple[list[Event], list[tuple[Record, int]]]] = []
        self._numbers = itertools.count(1)
        self._streams = itertools.count(UNARY + 1)

    @property
    def now(self) -> float:
        return self.plain.now

    @property
    def reasons(self) -> list[str]:
        """Why requests were refused by the last step."""
        return [str(record.facts[0]) for record in self.said if record.kind == "failed"]

    @property
    def is_drained(self) -> bool:
        return self.num_drained > 0

    def kinds(self, request: int) -> list[str]:
        """What a request was told by the last step."""
        return [record.kind for record in self.said if record.request == request]

    def plain_of(self, session_id: str) -> PlainSession:
        return self.plain.sessions[session_id]

    # Time and ticks.

    def pass_time(self, seconds: float) -> None:
        self.plain.now += seconds

    def sweep(self) -> None:
        self.agrees = False
        while self.engine.sweep(self.now):
            pass
        self._records = self._take_records()
        self.plain.sweep()
        self._compare()

    def begin(self) -> bool:
        """Begin a tick; False when nothing was ready."""
        self.agrees = False
        tick = self.engine.begin_tick(self.now)
        self._records = self._take_records()
        for record, _ in self._records:
            if record.facts[:1] == ("RUN_TIMED_OUT",):
                self._time_out(record)
        if tick is None:
            self._check_idle()
        else:
            self.ticks.append(tick)
            self._note_begun(tick)
        self._compare()
        return tick is not None

    def finish(self) -> None:
        """Finish the tick that was begun first."""
        self.agrees = False
        tick = self.ticks.popleft()
        result: Any = self.engine.collect(tick)
        self.engine.finish_tick(tick, result, self.now)
        self._records = self._take_records()
        counts = tick.counts if isinstance(tick, RunTick) else result.counts
        for row, count in zip(tick.rows.tolist(), counts.tolist(), strict=True):
            session = self._session_of(row)
            if isinstance(tick, GenerateTick):
                self.plain.sample(session, count)
            else:
                self.plain.advance(session, count)
        self._compare()

    def settle(self) -> None:
        """Run ticks until nothing is ready."""
        while self.ticks or self.begin():
            self.finish()

    def _note_begun(self, tick: Tick) -> None:
        counts = tick.counts.tolist() if isinstance(tick, RunTick) else [1] * len(tick.rows)
        rows = tick.rows.tolist()
        assert len(set(rows)) == len(rows) <= tick.served.stepper.max_batch
        for row, count in zip(rows, counts, strict=True):
            session = self._session_of(row)
            first = session.chain[0]
            assert session.model.name == tick.served.info.name
            assert not session.in_tick
            assert not self.plain.is_resting(session)
            session.in_tick = True
            if isinstance(tick, GenerateTick):
                assert isinstance(first, PlainGenerate)
                continue
            assert isinstance(first, PlainRun)
            assert first.begun or first.deadline >= self.now
            assert 1 <= count <= len(first.tokens) - first.done
            first.begun = True

    def _time_out(self, record: Record) -> None:
        for session in self.plain.everything:
            first = session.chain[0] if session.chain else None
            if isinstance(first, PlainRun) and (first.stream, first.request) == (record.stream, record.request):
                assert not first.begun
                assert first.deadline < self.now
                self.plain.give_up(session, [first], "RUN_TIMED_OUT")
                return
        raise AssertionError(f"{record} is of no run that could begin")

    def _check_idle(self) -> None:
        """Nothing was begun: no session could have been."""
        for stepper in self.steppers:
            of_model = [session for session in self.plain.everything if session.model is stepper.info]
            if sum(session.in_tick for session in of_model) < stepper.num_slots:
                assert all(s.in_tick or not s.chain or self.plain.is_resting(s) for s in of_model)

    def _session_of(self, row: int) -> PlainSession:
        return next(session for session in self.plain.everything if session.row == row)

    # Comparing.

    def _take_records(self) -> list[tuple[Record, int]]:
        events = self.engine.take_events()
        self._taken.append((events, flat_records(events)))
        return list(self._taken[-1][1])

    def _ask(self, stream: int) -> int:
        request = next(self._numbers)
        if stream in self.plain.streams or stream == UNARY:
            self.unanswered.add((stream, request))
        return request

    def _find(self, stream: int, session: int | str) -> PlainSession | str:
        return self.plain.by_id(session) if isinstance(session, str) else self.plain.by_handle(stream, session)

    def _handle(self, *commands: Command) -> list[tuple[Record, int]]:
        self.agrees = False
        left = deque(commands)
        while left:
            self.engine.handle_all(left, self.now)
        self._records = self._take_records()
        return self._records

    def _compare(self) -> None:
        """What the engine has said is what the plain sessions say; handles are learned where they are told."""
        expected, self.plain.expected = self.plain.expected, []
        if any(record.kind == "drained" for record, _ in self._records):
            assert self.plain.draining
            assert not any(session.chain for session in self.plain.everything)
            self.num_drained += 1
            self._records = [pair for pair in self._records if pair[0].kind != "drained"]
        said = sorted(self._records, key=lambda pair: (*pair[0].sort_key(), pair[1]))
        # Known handles first: what is left over is told for the first time.
        wanted = sorted(expected, key=lambda pair: (*pair[0].sort_key(), _number(pair[1])))
        of_engine, of_plain = Counter(record for record, _ in said), Counter(record for record, _ in wanted)
        assert of_engine == of_plain, _difference(of_engine, of_plain)
        _learn(said, wanted)
        self.said = [record for record, _ in said]
        answered = {
            (r.stream, r.request) for r in self.said if _is_last(r) and r.stream in {UNARY, *self.plain.streams}
        }
        assert answered <= self.unanswered
        self.unanswered -= answered
        self._records = []
        check_engine(self.engine.core)
        self.agrees = True


def _difference(of_engine: Counter[Record], of_plain: Counter[Record]) -> str:
    only_engine, only_plain = list((of_engine - of_plain).elements()), list((of_plain - of_engine).elements())
    return f"the engine says {only_engine[:5]}, the plain sessions {only_plain[:5]}"


def _number(grip: Grip | None) -> float:
    if grip is None:
        return 0
    return np.inf if grip.handle is None else grip.handle


def _learn(said: Sequence[tuple[Record, int]], wanted: Sequence[tuple[Record, Grip | None]]) -> None:
    """Match handles with grips among equal records."""
    left = Counter((record, handle) for record, handle in said)
    for record, grip in wanted:
        if grip is None or grip.handle is not None:
            key = (record, 0 if grip is None or grip.handle is None else grip.handle)
            assert left[key] > 0, (record, grip)
            left[key] -= 1
    for record, grip in wanted:
        if grip is not None and grip.handle is None:
            handle = next(handle for (other, handle), number in left.items() if other == record and number)
            left[record, handle] -= 1
            grip.handle = handle


def _is_last(record: Record) -> bool:
    """Whether a request has its last answer with this."""
    if record.kind == "answer":
        return record.facts[2] == 0
    if record.kind == "generated":
        return bool(record.facts[3])
    return record.kind in _LAST_WORDS
