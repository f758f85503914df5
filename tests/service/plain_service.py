"""The plain sessions at work: what must come of runs, repeats and generates.

Written from DESIGN.md section 4 and the contract's comments. It does not choose ticks: it is told which runs began and
how many tokens advanced, and says what must come of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellserve_service.messages import SubmitGenerate
from cellserve_service.outputs import At, OutputSpec
from cellserve_service.replay import MAX_JOINED
from tests.service.plain_lifecycle import PlainSessions
from tests.service.plain_sessions import (
    Held,
    PlainGenerate,
    PlainRun,
    PlainSession,
    Repeat,
    Tokens,
    settings_of,
)
from tests.service.records import OutputRow, expected_row, row_words

__all__ = ["PlainService"]


class PlainService(PlainSessions):
    """All sessions, and the records that the engine must have said: `expected`, with the grip that each tells."""

    def submit(
        self,
        session: PlainSession,
        stream: int,
        request: int,
        tokens: Tokens,
        spec: OutputSpec,
        position: int | None,
        deadline: float,
    ) -> None:
        """One run that was found valid in itself."""
        accepted, count = session.accepted, len(tokens)
        if session.generate is not None:
            self.refuse(stream, request, "SESSION_BUSY")
        elif position is None and session.chain:
            self.refuse(stream, request, "INVALID_INPUT")
        elif position is not None and position > accepted:
            self.refuse(stream, request, "POSITION_GAP", accepted)
        elif position is not None and position < accepted < position + count:
            self.refuse(stream, request, "POSITION_CONFLICT", accepted)
        elif position is not None and position < accepted:
            self._replay(session, Repeat(stream, request, deadline), position, tokens, spec)
        elif self.draining:
            self.refuse(stream, request, "DRAINING")
        elif (
            session.num_pending + count > self.limits.max_session_pending_tokens
            or sum(other.num_pending for other in self.everything) + count > self.limits.max_pending_tokens
        ):
            self.refuse(stream, request, "QUEUE_FULL")
        else:
            session.chain.append(PlainRun(stream, request, accepted, tokens, spec, deadline))
            session.accepted += count
            session.last_used = self.now

    def _replay(self, session: PlainSession, asked: Repeat, position: int, tokens: Tokens, spec: OutputSpec) -> None:
        for entry in session.since_last_reset():
            run = entry.run if isinstance(entry, Held) else entry
            if not isinstance(run, PlainRun) or (run.start, len(run.tokens)) != (position, len(tokens)):
                continue
            if run.tokens != tokens:
                self.refuse(asked.stream, asked.request, "POSITION_CONFLICT", session.accepted)
            elif run.spec != spec and (run.spec.wants or spec.wants):
                self.refuse(asked.stream, asked.request, "ANSWER_NOT_HELD", session.accepted)
            elif isinstance(entry, Held):
                self._give_held(session, entry, asked)
            elif len(run.joined) >= MAX_JOINED:
                self.refuse(asked.stream, asked.request, "QUEUE_FULL")
            else:
                run.joined.append(asked)
            return
        self.refuse(asked.stream, asked.request, "ANSWER_NOT_HELD", session.accepted)

    def _give_held(self, session: PlainSession, held: Held, asked: Repeat) -> None:
        run = held.run
        assert run is not None
        if run.spec.wants and not held.words:
            self.refuse(asked.stream, asked.request, "ANSWER_NOT_HELD", session.accepted)
            return
        count, step = len(run.tokens), len(run.tokens)
        if run.spec.wants and run.spec.at is At.EVERY:
            step = max(1, self.limits.max_answer_bytes // (4 * row_words(run.spec, session.model)))
        for first in range(0, count, step):
            end = min(count, first + step)
            rows = run.rows[first:end] if step < count else run.rows
            self.say("answer", asked.stream, asked.request, run.start + end, end - first, count - end, tuple(rows))

    def acknowledge(self, session: PlainSession, position: int) -> None:
        while session.held and session.held[0].start + session.held[0].count <= position:
            session.held.pop(0)

    def is_resting(self, session: PlainSession) -> bool:
        entry = session.chain[0] if session.chain else None
        if isinstance(entry, PlainGenerate):
            return entry.command.stream in self.paused
        return isinstance(entry, PlainRun) and entry.stream in self.paused and entry.stream == session.owner

    # What ticks bring.

    def advance(self, session: PlainSession, count: int) -> None:
        """A tick of so many tokens of the session's first run is over."""
        run, spec = session.chain[0], None
        assert isinstance(run, PlainRun)
        spec = run.spec
        session.in_tick = False
        session.last_used = self.now
        rows: list[OutputRow] = []
        for token in run.tokens[run.done : run.done + count]:
            vector: Any = np.asarray(token, np.uint32 if session.model.input_size is None else np.float32)
            session.state, outputs = session.model.advance(session.state, vector[()])
            run.done += 1
            session.position += 1
            if spec.wants and (spec.at is At.EVERY or run.done == len(run.tokens)):
                rows.append(expected_row(spec, outputs))
        run.rows += rows
        finished = run.done == len(run.tokens)
        if spec.wants and spec.at is At.EVERY:
            remaining = len(run.tokens) - run.done
            self.say("answer", run.stream, run.request, session.position, count, remaining, tuple(rows))
        elif finished:
            self.say("answer", run.stream, run.request, session.position, len(run.tokens), 0, tuple(rows))
        if finished:
            self._finish(session, run)

    def _finish(self, session: PlainSession, run: PlainRun) -> None:
        words = len(run.rows) * row_words(run.spec, session.model)
        held = Held(run.start, len(run.tokens), run, words if 4 * words <= self.limits.max_held_answer_bytes else 0)
        session.chain.pop(0)
        for repeat in run.joined:
            self._give_held(session, held, repeat)
        self._keep(session, held)
        self.settle(session)

    def _keep(self, session: PlainSession, held: Held) -> None:
        session.held.append(held)
        while (
            len(session.held) > self.limits.max_held_answers
            or 4 * sum(other.words for other in session.held) > self.limits.max_held_answer_bytes
        ):
            session.held.pop(0)

    # Generates.

    def generate(self, session: PlainSession, command: SubmitGenerate) -> None:
        current = session.generate
        if current is not None:
            reason = self._cannot_follow(session, current, command)
            if reason is not None:
                self.refuse(command.stream, command.request, *reason)
                return
            self.break_off(session, "RUN_CANCELLED")
            if session.generate is not None:
                current.successor = command
                return
        reason = self._start(session, command)
        if reason is not None:
            self.refuse(command.stream, command.request, *reason)
        self.settle(session)

    def _cannot_follow(
        self, session: PlainSession, current: PlainGenerate, command: SubmitGenerate
    ) -> tuple[str, int] | None:
        same = settings_of(current.command) == settings_of(command)
        if command.position is None or command.position > session.accepted or not same:
            return "SESSION_BUSY", 0
        if self.draining:
            return "DRAINING", 0
        if command.position < session.accepted:
            held = self._held_tokens(session, command, command.position)
            return (held, session.accepted) if isinstance(held, str) else None
        return None

    def _start(self, session: PlainSession, command: SubmitGenerate) -> tuple[str, int] | None:
        position = session.accepted if command.position is None else command.position
        remaining = command.max_tokens
        if position > session.accepted:
            return "POSITION_GAP", session.accepted
        if position < session.accepted:
            held = self._held_tokens(session, command, position)
            if isinstance(held, str):
                return held, session.accepted
            tokens, logprobs = held
            remaining -= len(tokens)
            stopped = tokens[-1] in command.stop_tokens
            finished = stopped or not remaining
            if not finished and position + len(tokens) != session.accepted:
                return "POSITION_CONFLICT", session.accepted
            if not finished and self.draining:
                return "DRAINING", 0
            self._say_generated(command, tokens, logprobs, position + len(tokens), finished, stopped)
            if finished:
                return None
        if self.draining:
            return "DRAINING", 0
        session.chain.append(PlainGenerate(command, remaining))
        session.last_used = self.now
        return None

    def _held_tokens(
        self, session: PlainSession, command: SubmitGenerate, position: int
    ) -> tuple[tuple[int, ...], tuple[float, ...]] | str:
        tokens: list[int] = []
        logprobs: list[float] = []
        for entry in session.since_last_reset():
            if not isinstance(entry, Held) or entry.start + entry.count <= position + len(tokens):
                continue
            if entry.start > position + len(tokens):
                break
            if entry.settings != settings_of(command):
                if not tokens:
                    return "POSITION_CONFLICT"
                break
            first = position + len(tokens) - entry.start
            tokens += entry.tokens[first:]
            logprobs += entry.logprobs[first:]
        if not tokens:
            return "ANSWER_NOT_HELD"
        number = min(len(tokens), command.max_tokens)
        for place in range(number):
            if tokens[place] in command.stop_tokens:
                number = place + 1
                break
        return tuple(tokens[:number]), tuple(logprobs[:number])

    def _say_generated(
        self,
        command: SubmitGenerate,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        position: int,
        finished: bool,
        stopped: bool,
    ) -> None:
        values = np.array(logprobs, np.float32).tobytes()
        facts = (tuple(tokens), values, position, finished, stopped, command.seed)
        self.say("generated", command.stream, command.request, *facts)

    def sample(self, session: PlainSession, count: int) -> None:
        """A tick of so many tokens of the session's generate is over."""
        generate = session.chain[0]
        assert isinstance(generate, PlainGenerate)
        command, start = generate.command, session.position
        session.in_tick = False
        session.last_used = self.now
        tokens: list[int] = []
        logprobs: list[float] = []
        stopped = False
        for _ in range(count):
            assert not stopped
            settings = (command.seed, command.temperature, command.top_k, command.top_p)
            token = session.model.draw(session.state, session.position, *settings)
            session.state, outputs = session.model.advance(session.state, np.uint32(token))
            tokens.append(token)
            logprobs.append(outputs.logprob)
            session.position += 1
            stopped = token in command.stop_tokens
        session.accepted += count
        generate.remaining -= count
        assert generate.remaining >= 0
        finished = stopped or not generate.remaining
        held = Held(start, count, None, 2 * count, tuple(tokens), tuple(logprobs), settings_of(command))
        self._keep(session, held)
        self._say_generated(command, tokens, logprobs, session.position, finished, stopped)
        if finished or generate.broken_off is not None:
            if not finished and generate.broken_off is not None:
                self.refuse(command.stream, command.request, generate.broken_off)
            session.chain.pop(0)
            if generate.successor is not None:
                self.generate(session, generate.successor)
        self.settle(session)
