"""The engine against the plain sessions, in any order of commands, ticks and time that hypothesis can think of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import InitialState
from cellserve_service.outputs import NO_OUTPUTS, At, OutputSpec
from tests.service.driving import TOKENS, UNARY, VECTORS, Driver, Row
from tests.service.plain_sessions import Held, PlainRun, PlainSession, settings_of
from tests.service.profiles import STATEFUL
from tests.support.steppers import FakeModel

IDS = ("a", "b", "c", "d", "e", "f")
FOREIGN = InitialState(b"?" * 32, 3, np.zeros((2, 3), np.float32))
SPECS = (
    NO_OUTPUTS,
    OutputSpec(at=At.EVERY),
    OutputSpec(at=At.LAST, head_outputs=True),
    OutputSpec(at=At.EVERY, head_outputs=True),
    OutputSpec(at=At.EVERY, states=True),
    OutputSpec(at=At.LAST, states=True),
    OutputSpec(at=At.EVERY, next_token=True, logprobs=True),
    OutputSpec(at=At.LAST, next_token=True, top_k=3),
    OutputSpec(at=At.EVERY, top_k=2, gates=True),
)
LIMITS = EngineLimits(
    max_sessions=5,
    max_run_tokens=7,
    max_session_pending_tokens=9,
    max_pending_tokens=15,
    max_held_answers=2,
    max_held_answer_bytes=100,
    max_answer_bytes=80,
    idle_timeout_seconds=50.0,
    ended_session_memory_seconds=80.0,
    max_slice_tokens=3,
    max_sliced_tick_tokens=5,
)


class EngineMachine(RuleBasedStateMachine):
    """Every rule drives both sides by one command, and the driver compares them."""

    limits = LIMITS

    @initialize(num_slots=st.integers(1, 3), max_batch=st.integers(1, 4), evicts=st.booleans())
    def begin(self, num_slots: int, max_batch: int, evicts: bool) -> None:
        limits = replace(self.limits, evict_when_full=evicts)
        self.driver = Driver(limits, num_slots=num_slots, max_batch=max_batch)
        self.streams = [self.driver.new_stream(), self.driver.new_stream()]
        self.driver.open(self.streams[0], ["a", "b", "c"])
        self.driver.open(self.streams[1], ["d"], model="vectors")

    # What the rules choose from.

    @property
    def plain(self) -> Any:
        return self.driver.plain

    def _stream(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.streams))

    def _handle(self, data: st.DataObject, stream: int) -> int:
        """Mostly a handle that is valid on the stream; sometimes any handle there ever was, or none of ours."""
        known = [grip for grip in self.plain.grips if grip.handle is not None]
        valid = [grip.handle for grip in known if grip.stream == stream and grip.session.grip is grip]
        anything = [grip.handle for grip in known[-8:]] + [2**63 + 17]
        handle: int = data.draw(st.sampled_from(valid * 9 + anything))
        return handle

    def _id(self, data: st.DataObject) -> str:
        """Mostly the id of a session that is open."""
        session_id: str = data.draw(st.sampled_from([*self.plain.sessions, *self.plain.sessions, *IDS]))
        return session_id

    def _session(self, data: st.DataObject, stream: int, handle: int | str) -> PlainSession | None:
        found = self.driver._find(stream, handle)
        return None if isinstance(found, str) else found

    def _tokens(self, data: st.DataObject, model: FakeModel) -> tuple[Any, ...]:
        number = data.draw(st.integers(1, 5) | st.integers(0, 9))
        if model.vocab_size is None:
            odd = data.draw(st.integers(0, 30)) == 0
            return tuple((float("nan") if odd else float(place), 2.0) for place in range(number))
        tokens = st.integers(0, 6) if data.draw(st.integers(0, 20)) else st.integers(0, 7)
        return tuple(data.draw(st.lists(tokens, min_size=number, max_size=number)))

    def _row(self, data: st.DataObject, stream: int, named: int | str, sent: dict[int, int]) -> Row:
        session = self._session(data, stream, named)
        model = TOKENS if session is None else session.model
        accepted = 0 if session is None else session.accepted + sent.get(id(session), 0)
        tokens, position = self._tokens(data, model), accepted
        choice = data.draw(st.integers(0, 9))
        if choice >= 7 and session is not None:
            again = [held.run for held in session.held if held.run] + [
                run for run in session.chain if isinstance(run, PlainRun)
            ]
            if again:
                run = data.draw(st.sampled_from(again))
                tokens, position = run.tokens, run.start
                if choice == 9 and data.draw(st.booleans()):
                    tokens = (*tokens[:-1], tokens[0])
        elif choice == 6:
            position = data.draw(st.integers(0, accepted + 3))
        if session is not None and position == accepted:
            sent[id(session)] = sent.get(id(session), 0) + len(tokens)
        timeout = data.draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, 4.0]))
        return Row(named, tokens, position, timeout=timeout)

    # Commands.

    @rule(
        data=st.data(), mode=st.sampled_from([*OpenMode.values(), OpenMode.OPEN_MODE_UNSPECIFIED]), unary=st.booleans()
    )
    def open(self, data: st.DataObject, mode: OpenMode.ValueType, unary: bool) -> None:
        stream = UNARY if unary else self._stream(data)
        model = data.draw(st.sampled_from([TOKENS, TOKENS, VECTORS]))
        ids = data.draw(st.none() | st.lists(st.sampled_from(IDS), min_size=1, max_size=3))
        if ids is None and mode == OpenMode.OPEN_MODE_ATTACH:
            mode = OpenMode.OPEN_MODE_CREATE
        count = data.draw(st.integers(1, 2))
        states = None
        if data.draw(st.integers(0, 4)) == 0:
            states = [self._state(data, model) for _ in range(count if ids is None else len(ids))]
        self.driver.open(stream, ids, count=count, model=model.name, mode=mode, states=states, unary=unary)

    def _state(self, data: st.DataObject, model: FakeModel) -> InitialState:
        if data.draw(st.integers(0, 5)) == 0:
            return FOREIGN
        shape = (model.num_layers, model.state_size)
        value = data.draw(st.integers(0, 8190))
        return InitialState(model.fingerprint, data.draw(st.integers(0, 9)), np.full(shape, value, np.float32))

    @rule(data=st.data(), spec=st.sampled_from(SPECS), number=st.integers(1, 4))
    def run(self, data: st.DataObject, spec: OutputSpec, number: int) -> None:
        stream = self._stream(data)
        self.driver.run(stream, *self._rows(data, stream, number, {}), outputs=spec)

    @rule(data=st.data(), spec=st.sampled_from(SPECS), number=st.integers(2, 4))
    def run_together(self, data: st.DataObject, spec: OutputSpec, number: int) -> None:
        """Runs of several streams, and of unary calls, that come in one turn of the event loop."""
        sent: dict[int, int] = {}
        batches = []
        for _ in range(number):
            if data.draw(st.integers(0, 3)) == 0:
                batches.append((UNARY, [self._row(data, UNARY, self._id(data), sent)]))
            else:
                stream = self._stream(data)
                batches.append((stream, self._rows(data, stream, data.draw(st.integers(1, 2)), sent)))
        self.driver.run_together(*batches, outputs=spec)

    def _rows(self, data: st.DataObject, stream: int, number: int, sent: dict[int, int]) -> list[Row]:
        rows = [self._row(data, stream, self._handle(data, stream), sent) for _ in range(number)]
        if len({isinstance(token, tuple) for row in rows for token in row.tokens}) == 2:
            # One column for all: the rows of the other kind of model are meant to be refused.
            for row in rows:
                row.tokens = tuple(0 for _ in row.tokens)
        if data.draw(st.integers(0, 4)) == 0:
            for row in rows:
                row.position = None
        if data.draw(st.integers(0, 2)) == 0:
            for row in rows:
                row.acknowledged = data.draw(st.integers(0, 12))
        return rows

    @rule(data=st.data(), spec=st.sampled_from(SPECS), positioned=st.booleans())
    def step(self, data: st.DataObject, spec: OutputSpec, positioned: bool) -> None:
        row = self._row(data, UNARY, self._id(data), {})
        if not positioned:
            row.position = None
        self.driver.run(UNARY, row, outputs=spec)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """The exact repeat of a run that has run or will run, by id, for the same outputs."""
        runs = [
            (session.id, held.run)
            for session in self.plain.sessions.values()
            for held in [*session.held, *(Held(0, 0, run) for run in session.chain if isinstance(run, PlainRun))]
            if held.run is not None
        ]
        if runs:
            session_id, run = data.draw(st.sampled_from(runs))
            timeout = data.draw(st.sampled_from([0.0, 1.0, 4.0]))
            self.driver.run(UNARY, Row(session_id, run.tokens, run.start, timeout=timeout), outputs=run.spec)

    @rule(data=st.data(), position=st.integers(0, 15))
    def acknowledge(self, data: st.DataObject, position: int) -> None:
        stream = self._stream(data)
        handles = [self._handle(data, stream) for _ in range(2)]
        self.driver.acknowledge(stream, handles, [position, data.draw(st.integers(0, 15))])

    @precondition(lambda self: self.driver.unanswered)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.lists(st.sampled_from(sorted(self.driver.unanswered)), min_size=1, max_size=3))
        stream = asked[0][0]
        self.driver.cancel(stream, *(request for other, request in asked if other == stream))

    @rule(data=st.data(), tokens=st.integers(1, 40), greedy=st.booleans(), again=st.booleans())
    def generate(self, data: st.DataObject, tokens: int, greedy: bool, again: bool) -> None:
        session_id = self._id(data)
        session = self.plain.sessions.get(session_id)
        if again and session is not None and (session.generate or any(held.settings for held in session.held)):
            self._generate_again(data, session)
            return
        position = None if session is None or data.draw(st.booleans()) else session.accepted
        stops = data.draw(st.sampled_from([(), (), (2,), (5, 6), (9,)]))
        temperature = 0.0 if greedy else 1.0
        self.driver.generate(session_id, tokens, position, temperature=temperature, stop_tokens=stops)

    def _generate_again(self, data: st.DataObject, session: PlainSession) -> None:
        """With the settings of what is held or under way, from a position that was or is, or nearly."""
        slices = [held for held in session.held if held.settings]
        of_current = [settings_of(session.generate.command)] if session.generate else []
        kept = data.draw(st.sampled_from([held.settings for held in slices] + of_current))
        starts = [held.start for held in slices] + [session.accepted, session.accepted - 1, session.accepted + 1]
        position, tokens = data.draw(st.sampled_from(starts)), data.draw(st.integers(1, 40))
        settings: Any = kept
        temperature, _, _, seed, stops = settings
        self.driver.generate(
            session.id, tokens, max(0, position), temperature=temperature, seed=seed, stop_tokens=stops
        )

    @rule(data=st.data(), kind=st.sampled_from(["reset", "reset", "close"]))
    def by_handles(self, data: st.DataObject, kind: str) -> None:
        stream = self._stream(data)
        handles = [self._handle(data, stream) for _ in range(data.draw(st.integers(1, 2)))]
        getattr(self.driver, kind)(stream, *handles)

    @rule(data=st.data(), kind=st.sampled_from(["reset", "close", "export", "import", "fork", "look"]))
    def by_id(self, data: st.DataObject, kind: str) -> None:
        session_id = self._id(data)
        session = self.plain.sessions.get(session_id)
        match kind:
            case "reset":
                self.driver.reset(UNARY, session_id)
            case "close":
                self.driver.close(UNARY, session_id, evicts=data.draw(st.booleans()))
            case "export":
                self.driver.export(session_id)
            case "import":
                self.driver.import_state(session_id, self._state(data, TOKENS if session is None else session.model))
            case "fork":
                self.driver.fork(session_id, data.draw(st.sampled_from(IDS)))
            case "look":
                self.driver.get(session_id)
                self.driver.list_page(session_id, data.draw(st.integers(1, 3)))

    # Streams, time and ticks.

    @rule(data=st.data(), paused=st.booleans())
    def pause(self, data: st.DataObject, paused: bool) -> None:
        self.driver.pause(data.draw(st.sampled_from([*self.streams, UNARY])), paused)

    @rule(data=st.data())
    def replace_stream(self, data: st.DataObject) -> None:
        stream = self._stream(data)
        self.driver.end_stream(stream)
        self.streams[self.streams.index(stream)] = self.driver.new_stream()

    @rule(seconds=st.sampled_from([0.5, 2.0, 2.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.driver.pass_time(seconds)
        self.driver.sweep()

    @precondition(lambda self: len(self.driver.ticks) < 2)
    @rule()
    def begin_tick(self) -> None:
        self.driver.begin()

    @precondition(lambda self: self.driver.ticks)
    @rule(again=st.booleans())
    def finish_tick(self, again: bool) -> None:
        """As the engine's thread does with two ticks in flight: one more begins before the first is awaited."""
        if again and len(self.driver.ticks) < 2:
            self.driver.begin()
        self.driver.finish()

    @rule(times=st.integers(1, 4))
    def tick(self, times: int) -> None:
        for _ in range(times):
            if len(self.driver.ticks) < 2:
                self.driver.begin()
            if self.driver.ticks:
                self.driver.finish()

    @rule(luck=st.integers(0, 25))
    def drain(self, luck: int) -> None:
        if luck == 0:
            self.driver.drain()

    def teardown(self) -> None:
        # After a failure there is nothing to add.
        if hasattr(self, "driver") and self.driver.agrees:
            self.driver.end()


def test_the_engine_does_what_the_plain_sessions_do() -> None:
    run_state_machine_as_test(EngineMachine, settings=STATEFUL)
