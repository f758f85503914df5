"""A client that keeps its tokens and sends again what was not answered; it knows what a quiet day would have brought.

It checks everything it is told: every answer is the one of the quiet run, every position lies between what was durable
and what was sent, what is answered is in the store already where that is promised.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service import messages
from cellserve_service.messages import InitialState, SessionTarget, SubmitGenerate
from cellserve_service.outputs import At, OutputSpec
from cellserve_service.sessions import Durability
from cellserve_service.stepping import FloatArray
from cellserve_service.stores.operations import Row
from cellserve_service.stores.rows import decode_marks, decode_session
from tests.service.fleet import Fleet, Replica
from tests.service.records import OutputRow, Record, expected_row
from tests.service.side_by_side import UNARY
from tests.support.steppers import FakeModel, Outputs

__all__ = ["KeepingClient", "Line", "Sent", "flipped"]

GONE = {"SESSION_NOT_FOUND", "SESSION_EXPIRED", "SESSION_CLOSED", "SESSION_EVICTED"}
PASSING = {"STORE_UNAVAILABLE", "DRAINING", "SESSION_LIMIT", "SESSION_MOVED", "SESSION_BUSY", "QUEUE_FULL"}
OF_RUNS = PASSING | {"STALE_HANDLE", "POSITION_GAP", "RUN_CANCELLED"}
STOPS = (2,)

_request_ids = itertools.count(1)


class Line:
    """What a session consumes from one replacement of its state to the next, and what comes of it undisturbed."""

    def __init__(self, model: FakeModel, start: int, state: FloatArray) -> None:
        self.model, self.start = model, start
        self.states = [state]
        self.tokens: list[int] = []
        self.outputs: list[Outputs] = []

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def append(self, token: int) -> None:
        state, outputs = self.model.advance(self.states[-1], np.uint32(token))
        self.states.append(state)
        self.outputs.append(outputs)
        self.tokens.append(token)

    def holds(self, position: int, state: FloatArray) -> bool:
        """Whether it is the line's state at a position."""
        return self.start <= position <= self.end and np.array_equal(self.states[position - self.start], state)

    def rows(self, spec: OutputSpec, first: int, end: int) -> tuple[OutputRow, ...]:
        return tuple(expected_row(spec, self.outputs[place - self.start]) for place in range(first, end))


@dataclass(eq=False, repr=False)
class Sent:
    """A run, or a generate with its seed."""

    line: Line
    position: int
    count: int
    spec: OutputSpec
    max_tokens: int = 0  # of a generate
    seed: int | None = None
    answered: bool = False

    def __repr__(self) -> str:
        return f"{self.position}-{self.end}{'' if self.seed is None else 'g'}{'' if self.answered else '?'}"

    @property
    def end(self) -> int:
        return self.position + self.count

    @property
    def tokens(self) -> list[int]:
        return self.line.tokens[self.position - self.line.start : self.end - self.line.start]


@dataclass(eq=False)
class Grip:
    replica: Replica
    stream: int
    handle: int


@dataclass(eq=False)
class Op:
    """Something that is done to a session by a unary call, and asked for again until it is."""

    kind: str
    request_id: str
    name: str = ""  # of a mark, or of a fork
    target: Line | None = None  # what the session is afterwards
    is_asked: bool = False
    first_asked: float = np.inf
    answer: tuple[object, ...] = ()


@dataclass(eq=False)
class Asked:
    """A request on its way."""

    kind: str
    what: Any = None
    cursor: int = 0


@dataclass(eq=False, repr=False)
class KeepingClient:
    fleet: Fleet
    id: str
    durability: int
    holder: int
    home: int = 0  # the replica of a session that is not durable
    line: Line | None = None  # None: it is not open
    birth: Line | None = None  # how it is created
    tried: bool = False  # to create it
    runs: list[Sent] = field(default_factory=list)  # of the line
    unsent: list[Sent] = field(default_factory=list)
    grip: Grip | None = None
    must_open: bool = True
    asked: dict[tuple[Replica, int, int], Asked] = field(default_factory=dict)
    durable: int = 0
    epoch: int = 0
    acknowledged: int = 0
    op: Op | None = None
    last_op: Op | None = None
    lines: list[Line] = field(default_factory=list)
    marks: dict[str, tuple[int, FloatArray]] = field(default_factory=dict)
    stranger_asked: bool = False  # since we held it last, somebody else has asked for it
    is_damaged: bool = False
    touched: float = 0.0  # by what surely counts as use; an answer that is given again does not
    expires_at: float = np.inf  # of the stored row, wall clock
    forks: list[tuple[str, Line]] = field(default_factory=list)  # that were made since the test looked

    def __post_init__(self) -> None:
        self.fleet.listeners.append(self._hear)
        self.fleet.row_checks.append(self._check_row)

    @property
    def is_durable(self) -> bool:
        return self.durability != Durability.NONE

    @property
    def is_open(self) -> bool:
        return self.line is not None

    @property
    def is_settled(self) -> bool:
        """Nothing is left to be asked or answered."""
        return not self.asked and self.op is None and all(run.answered for run in self.runs)

    def is_asking(self, *kinds: str) -> bool:
        return any(asked.kind in kinds for asked in self.asked.values())

    def __repr__(self) -> str:
        line = None if self.line is None else (self.line.start, self.line.end)
        return f"<{self.id} {line} asked={list(self.asked.values())} op={self.op} runs={self.runs}>"

    def check_drained(self) -> None:
        """What was answered is stored, but for what the server has forgotten in a crash and not been sent again."""
        if self.op is None and self.line is not None and not self.is_damaged and not self.stranger_asked:
            answered = [run.end for run in self.runs if run.answered and run not in self.unsent]
            self._check_stored(max(answered, default=self.line.start))

    # Opening.

    def open(self, replica: Replica, stream: int, *, mode: OpenMode.ValueType, state: InitialState | None) -> None:
        """state: with which the session is created; of the first try only."""
        creates = mode not in (OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_RESUME)
        if self.line is None and self.birth is None and creates:
            values, position = (self.fleet.model.zero_state(), 0) if state is None else (state.values, state.position)
            self.birth = Line(self.fleet.model, position, values)
        states = None
        if self.line is None and creates:
            assert self.birth is not None
            if self.birth.states[0].any() or self.birth.start:
                states = [InitialState(self.fleet.model.fingerprint, self.birth.start, self.birth.states[0])]
        [request] = replica.ask(stream)
        self.asked[replica, stream, request] = Asked("open", mode, int(self.tried))
        self.tried |= creates
        replica.handle(
            messages.OpenSessions(
                stream,
                np.array([request], np.uint64),
                self.fleet.model.name,
                [self.id],
                mode,
                self.durability,  # type: ignore[arg-type]
                states,
                holders=np.array([self.holder], np.uint64),
            )
        )

    def _opened(self, asked: Asked, replica: Replica, record: Record, handle: int) -> None:
        _, position, epoch, created, durable, durability = record.facts
        assert isinstance(position, int)
        assert isinstance(epoch, int)
        assert isinstance(durable, int)
        if self.line is None and not created and not asked.cursor:
            # It was told as expired; a stranger had it on a server that had not yet looked, and it has come back.
            assert self.stranger_asked, "it was never created"
            self._begin(self.lines[-1])
        if self.line is None:
            assert self.birth is not None
            assert durability == self.durability
            assert position == self.birth.start
            self._begin(self.birth)
            self.durable, self.last_op = durable, None
        assert self.line is not None
        if self.op is None:
            assert self.durable <= position <= self.line.end, (self.durable, position, self.line.end)
            if self.is_durable:
                assert self.durable <= durable <= position
                self.durable = durable
                self._check_stored(durable)
            assert epoch > self.epoch, (epoch, self.epoch)
        self.epoch = max(self.epoch, epoch)
        self.stranger_asked = self.is_asking("stranger")
        self.grip = Grip(replica, record.stream, handle)
        # Runs on other ways may still come to their end; they are sent again all the same.
        self.unsent = [run for run in self.runs if run.end > position or not run.answered]
        self.must_open = self.op is not None
        self._touch()

    # Running.

    def add_run(self, tokens: list[int], spec: OutputSpec) -> None:
        assert self.line is not None
        self._add(Sent(self.line, self.line.end, len(tokens), spec), tokens)

    def add_generate(self, max_tokens: int, seed: int) -> None:
        assert self.line is not None
        line, tokens = self.line, list[int]()
        state, position = line.states[-1], line.end
        while len(tokens) < max_tokens and not (tokens and tokens[-1] in STOPS):
            tokens.append(self.fleet.model.draw(state, position + len(tokens), seed, 1.0, 0, 1.0))
            state, _ = self.fleet.model.advance(state, np.uint32(tokens[-1]))
        self._add(Sent(line, line.end, len(tokens), OutputSpec(), max_tokens, seed), tokens)

    def _add(self, sent: Sent, tokens: list[int]) -> None:
        for token in tokens:
            sent.line.append(token)
        self.runs.append(sent)
        self.unsent.append(sent)

    def send(self, replica: Replica) -> None:
        """Send what has not been sent, up to a generate that is not over; a generate goes to `replica`."""
        grip = self.grip
        while self.unsent and grip is not None and self.grip is grip and self.op is None:
            if self.is_asking("generate"):
                return
            sent = self.unsent.pop(0)
            if sent.seed is not None:
                self.send_generate(replica, sent)
            else:
                self._send_run(grip, sent)

    def _send_run(self, grip: Grip, sent: Sent) -> None:
        [request] = grip.replica.ask(grip.stream)
        self.asked[grip.replica, grip.stream, request] = Asked("run", sent, sent.position)
        grip.replica.handle(self._runs(grip.stream, request, sent, handle=grip.handle))

    def send_generate(self, replica: Replica, sent: Sent) -> None:
        [request] = replica.ask(UNARY)
        self.asked[replica, UNARY, request] = Asked("generate", sent, sent.position)
        assert sent.seed is not None
        replica.handle(
            SubmitGenerate(
                UNARY, request, self.id, sent.position, sent.max_tokens, 1.0, 0, 1.0, sent.seed, stop_tokens=STOPS
            )
        )

    def echo(self, replica: Replica, sent: Sent) -> None:
        """Somebody sends a run of ours once more, by a unary call."""
        [request] = replica.ask(UNARY)
        self.asked[replica, UNARY, request] = Asked("echo", sent, sent.position)
        replica.handle(self._runs(UNARY, request, sent))

    def _runs(self, stream: int, request: int, sent: Sent, handle: int | None = None) -> messages.SubmitRuns:
        return messages.SubmitRuns(
            streams=np.array([stream]),
            requests=np.array([request], np.uint64),
            handles=None if handle is None else np.array([handle], np.uint64),
            session_ids=[self.id] if handle is None else None,
            counts=np.array([sent.count], np.int64),
            tokens=np.array(sent.tokens, np.uint32),
            vectors=None,
            positions=np.array([sent.position], np.int64),
            timeouts_seconds=None,
            acknowledged=None,
            outputs=sent.spec,
        )

    def acknowledge(self) -> None:
        assert self.grip is not None
        position = next((run.position for run in self.runs if not run.answered), self.line.end if self.line else 0)
        self.acknowledged = max(self.acknowledged, position)
        handles, positions = np.array([self.grip.handle], np.uint64), np.array([position], np.int64)
        self.grip.replica.handle(messages.Acknowledge(self.grip.stream, handles, positions))

    def detach(self) -> None:
        grip = self.grip
        assert grip is not None
        [request] = grip.replica.ask(grip.stream)
        self.asked[grip.replica, grip.stream, request] = Asked("detach", self.line)
        self.grip = None
        requests, handles = np.array([request], np.uint64), np.array([grip.handle], np.uint64)
        grip.replica.handle(messages.DetachSessions(SessionTarget(grip.stream, requests, handles)))

    def _answered(self, asked: Asked, record: Record) -> None:
        sent: Sent = asked.what
        position, count, remaining, rows = record.facts
        assert isinstance(position, int)
        assert isinstance(count, int)
        assert isinstance(remaining, int)
        assert position - count == asked.cursor, "a slice is missing, or comes twice"
        assert position + remaining == sent.end
        asked.cursor = position
        expected: tuple[OutputRow, ...] = ()
        if sent.spec.wants:
            first = position - count if sent.spec.at is At.EVERY else position - 1
            expected = sent.line.rows(sent.spec, first, position)
        assert rows == expected, "it is not the answer of the quiet run"
        self._consumed(sent, position, remaining == 0)

    def _generated(self, asked: Asked, record: Record) -> None:
        sent: Sent = asked.what
        tokens, logprobs, position, finished, stopped, seed = record.facts
        assert isinstance(tokens, tuple)
        assert isinstance(position, int)
        first = position - len(tokens)
        assert first == asked.cursor, "tokens are missing, or come twice"
        asked.cursor = position
        line = sent.line
        assert list(tokens) == line.tokens[first - line.start : position - line.start]
        outputs = line.outputs[first - line.start : position - line.start]
        assert logprobs == np.array([one.logprob for one in outputs], np.float32).tobytes()
        assert seed == sent.seed
        assert finished == (position == sent.end)
        assert not stopped or finished
        self._consumed(sent, position, bool(finished))

    def _consumed(self, sent: Sent, position: int, finished: bool) -> None:
        sent.answered |= finished
        if self.durability == Durability.SYNC and sent.line is self.line:
            self._check_stored(position)

    def _check_stored(self, position: int) -> None:
        """What was told of the line up to a position is in the store, or what came after it."""
        row = self.fleet.living(self.id)
        if self.is_damaged or self._has_expired(row):
            return
        if self.op is None:
            assert row is not None, "it was told of what is not stored"
            assert row.position >= position, "it was told of what is not stored"
        elif self.op is not None and self.op.kind == "close":
            assert row is None or row.position >= position

    # Operations.

    def begin_op(self, kind: str, *, name: str = "", target: Line | None = None) -> None:
        assert self.op is None
        self.op = Op(kind, f"request {next(_request_ids)}", name, target)

    def send_op(self, replica: Replica, op: Op, *, again: bool = False) -> None:
        [request] = replica.ask(UNARY)
        self.asked[replica, UNARY, request] = Asked("again" if again else "op", op)
        op.is_asked = op.is_asked or not again
        op.first_asked = min(op.first_asked, self.fleet.now)
        target = SessionTarget(
            UNARY,
            np.array([request], np.uint64),
            session_ids=[self.id],
            request_id=op.request_id,
            holder=self.holder,
        )
        replica.handle(self._op_command(op, target))

    def _op_command(self, op: Op, target: SessionTarget) -> messages.Command:
        match op.kind:
            case "reset":
                return messages.ResetSessions(target)
            case "import":
                assert op.target is not None
                state = InitialState(self.fleet.model.fingerprint, op.target.start, op.target.states[0])
                return messages.ImportSession(target, state)
            case "rollback":
                return messages.RollbackSession(target, op.name)
            case "checkpoint":
                return messages.CheckpointSession(target, op.name)
            case "fork":
                return messages.ForkSession(target, op.name)
        return messages.CloseSessions(target)

    def _op_done(self, op: Op, record: Record) -> None:
        if op is not self.op:
            return  # it was heard meanwhile that the session is no more
        op.answer = record.facts
        self.op, self.last_op = None, op
        row = self.fleet.living(self.id)
        line = self.line
        assert line is not None
        match op.kind:
            case "reset" | "import" | "rollback":
                epoch, position = record.facts[:2]
                assert isinstance(epoch, int)
                assert op.target is not None
                assert position == op.target.start
                self.epoch = max(self.epoch, epoch)
                self._begin(op.target)
                self.durable = op.target.start if self.is_durable else 0
                if self.is_durable and not self.is_damaged and not self._has_expired(row):
                    assert row is not None
                    assert op.target.holds(*self._read(row)), "it was answered before it was stored"
            case "checkpoint":
                position = record.facts[1]
                assert isinstance(position, int)
                self.marks[op.name] = (position, line.states[position - line.start])
                if self.is_durable and not self.is_damaged and not self._has_expired(row):
                    assert row is not None
                    assert op.name in decode_marks(self.id, row.checkpoints, 2, 3)
            case "fork":
                fork_id, position, _ = record.facts
                assert fork_id == op.name
                assert isinstance(position, int)
                fork = Line(self.fleet.model, position, line.states[position - line.start])
                self.forks.append((op.name, fork))
                stored = self.fleet.living(op.name)
                if self.is_durable and not self._has_expired(stored):
                    assert stored is not None
                    assert fork.holds(*self._read(stored, op.name))
            case "close":
                assert row is None or not self.is_durable, "it was answered before it was stored"
                self._end()
        if op.target is not None:  # to mark or fork a session does not count as using it
            self._touch()

    # What is heard.

    def drop_stream(self, replica: Replica, stream: int | None) -> None:
        """The stream, or all of a process, is gone, and what was asked on it."""
        for key in [key for key in self.asked if key[0] is replica and stream in (None, key[1])]:
            asked = self.asked.pop(key)
            if asked.kind == "op":
                asked.what.is_asked = False
            self.must_open |= asked.kind in ("run", "generate")
        if self.grip is not None and self.grip.replica is replica and stream in (None, self.grip.stream):
            self.grip = None
        if stream is None and not self.is_durable and self.home == self.fleet.place_of(replica):
            self._end()

    def _hear(self, replica: Replica, record: Record, handle: int) -> None:
        grip = self.grip
        holds = grip is not None and (grip.replica, grip.stream, grip.handle) == (replica, record.stream, handle)
        if record.kind == "durable" and holds:
            self._told_durable(record)
        elif record.kind == "ended" and holds:
            self.grip = None
            reason = record.facts[0]
            assert (
                reason in {"SESSION_MOVED", "STALE_HANDLE", "SESSION_CLOSED", "SESSION_EXPIRED"}
                or (reason == "STATE_DAMAGED" and self.is_damaged)
                or (reason == "SESSION_EVICTED" and self._can_be_evicted)
            )
        asked = self.asked.get((replica, record.stream, record.request))
        if asked is None:
            return
        goes_on = {"answer": record.facts[2:3] != (0,), "generated": record.facts[3:4] == (False,)}
        if not goes_on.get(record.kind, False):
            del self.asked[replica, record.stream, record.request]
        match record.kind:
            case "failed":
                if asked.kind == "op":
                    asked.what.is_asked = False
                self._failed(asked, str(record.facts[0]))
            case "opened":
                if asked.kind == "open":
                    self._opened(asked, replica, record, handle)
            case "answer":
                self._answered(asked, record)
            case "generated":
                self._generated(asked, record)
            case "exported":
                _, position, values = record.facts
                assert isinstance(position, int)
                assert isinstance(values, bytes)
                state = np.frombuffer(values, np.float32).reshape(2, 3)
                assert any(line.holds(position, state) for line in self._candidates(past=True))
            case "done" | "forked":
                if asked.kind == "op":
                    self._op_done(asked.what, record)
                elif asked.kind == "again":
                    first = 1 if asked.what.kind == "close" else 0  # an ended session has no epoch any more
                    assert record.facts[first:2] == asked.what.answer[first:2], "a repeat was answered otherwise"
                elif asked.kind == "detach" and asked.what is self.line and self.is_durable and self.op is None:
                    epoch, position = record.facts[:2]
                    assert isinstance(epoch, int)
                    assert isinstance(position, int)
                    self.epoch = max(self.epoch, epoch)
                    self._check_stored(position)

    def _told_durable(self, record: Record) -> None:
        position = record.facts[0]
        assert isinstance(position, int)
        if self.op is None:
            assert self.line is not None
            assert self.durable <= position <= self.line.end
            self.durable = position
            self._check_stored(position)

    def _failed(self, asked: Asked, reason: str) -> None:
        if reason in GONE:
            self._gone(asked, reason)
            return
        if reason == "STATE_DAMAGED":
            assert self.is_damaged or not self.is_open  # it has been closed since
            self.grip = None
            if asked.kind == "op" and asked.what is self.op:
                self.op = None
            return
        match asked.kind:
            case "run" | "generate":
                # A generate that is repeated may be acknowledged before it is looked at.
                is_let_go = reason == "ANSWER_NOT_HELD" and asked.what.position < self.acknowledged
                assert reason in OF_RUNS or is_let_go, reason
                self.must_open = True
                if reason in ("SESSION_MOVED", "STALE_HANDLE"):
                    self.grip = None
            case "echo":
                assert reason in OF_RUNS | {"ANSWER_NOT_HELD"}, reason
            case "overtaken":
                pass
            case "open":
                if reason == "SESSION_EXISTS":
                    assert self.tried or self.line is not None
                elif reason == "SESSION_MOVED" and asked.what == OpenMode.OPEN_MODE_RESUME:
                    assert self.stranger_asked or self.line is None
                else:
                    assert reason in PASSING, reason
            case "op" | "again":
                assert reason in PASSING, (asked.what.kind, reason)
            case _:
                assert reason in PASSING | {"STALE_HANDLE"}, (asked.kind, reason)

    def _gone(self, asked: Asked, reason: str) -> None:
        """It is said that there is no such session."""
        if asked.kind == "again" and asked.what.kind == "close":
            assert reason == "SESSION_NOT_FOUND"
            assert self.fleet.now - asked.what.first_asked >= self.fleet.limits.ended_session_memory_seconds
            return
        if self.line is None:
            return
        if self.op is not None and self.op.kind == "close":
            if asked.kind != "op":
                return  # it may have been done, and its answer is under way
            assert self._may_have_ended(), (asked.kind, reason)
        assert self._may_have_ended(), (asked.kind, reason)
        self._end()

    def _has_expired(self, row: Row | None) -> bool:
        return row is None and self._may_have_expired()

    @property
    def _can_be_evicted(self) -> bool:
        """A durable session is left to the store instead."""
        return not self.is_durable and self.fleet.limits.evict_when_full

    def _may_have_ended(self) -> bool:
        return self._can_be_evicted or self._may_have_expired()

    def _may_have_expired(self) -> bool:
        idle = self.fleet.now - self.touched
        # What was told had happened up to a few seconds before.
        return idle > self.fleet.limits.idle_timeout_seconds - 10 or self.expires_at <= self.fleet.wall

    def _check_row(self, row: Row) -> None:
        """What is stored is where the session was on the quiet day, and nothing that was told as durable is missing."""
        if row.session_id != self.id or not self.is_durable:
            return
        self.expires_at = row.expires_at
        if self.is_damaged or not self._candidates() or row.expires_at <= self.fleet.wall:
            return
        position, state = self._read(row)
        assert any(line.holds(position, state) for line in self._candidates()), (
            self,
            position,
            "what is stored never was",
        )
        if self.op is None and self.line is not None:
            assert position >= self.durable, "what was durable is not stored any more"

    def _candidates(self, *, past: bool = False) -> list[Line]:
        lines = [self.line, self.birth, None if self.op is None else self.op.target]
        return [line for line in lines if line is not None] + (self.lines if past else [])

    def _read(self, row: Row, session_id: str = "") -> tuple[int, FloatArray]:
        read = decode_session(session_id or self.id, row.request_id, row.blob)
        assert read.position == row.position
        return read.position, read.state()

    def _touch(self) -> None:
        self.touched = self.fleet.now

    def _begin(self, line: Line) -> None:
        self.line, self.birth = line, None
        self.lines.append(line)
        self.runs, self.unsent = [], []
        self.must_open = True
        self.acknowledged = 0

    def adopt(self, line: Line) -> None:
        """The session was made by a fork."""
        self._begin(line)
        self.last_op = None
        self.durable = line.start if self.is_durable else 0
        self.epoch = 0
        self.stranger_asked = True  # a fork has no holder
        self._touch()

    def _end(self) -> None:
        for asked in self.asked.values():
            if asked.kind == "open":  # what comes of it was so before the end
                asked.kind = "overtaken"
        self.line = self.birth = self.grip = self.op = None
        self.runs, self.unsent = [], []
        self.tried = self.is_damaged = False
        self.must_open = True
        self.durable = self.epoch = 0
        self.marks = {}


def flipped(blob: bytes, place: int) -> bytes:
    """With one byte changed."""
    place %= len(blob)
    return blob[:place] + bytes([blob[place] ^ 0x41]) + blob[place + 1 :]
