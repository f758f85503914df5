"""Drives an engine and the plain sessions by the same commands; every call checks that both say the same."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.merging import take_alike
from cellserve_service.messages import Command, InitialState, SessionTarget, SubmitGenerate
from cellserve_service.outputs import NO_OUTPUTS, OutputSpec
from tests.service.engine_checks import check_nothing_left
from tests.service.plain_sessions import PlainSession
from tests.service.records import flat_records
from tests.service.side_by_side import TOKENS, UNARY, VECTORS, SideBySide

__all__ = ["TOKENS", "UNARY", "VECTORS", "Driver", "Row"]


class Row:
    """One row of a run command: tokens of a session, addressed by handle or by id."""

    def __init__(
        self,
        session: int | str,
        tokens: Sequence[int] | Sequence[tuple[float, ...]],
        position: int | None = None,
        *,
        timeout: float = 0.0,
        acknowledged: int = 0,
    ) -> None:
        self.session, self.position = session, position
        self.tokens = tuple(tokens)
        self.timeout, self.acknowledged = timeout, acknowledged


class Driver(SideBySide):
    """Every command there is, given to both sides."""

    # Streams.

    def new_stream(self) -> int:
        stream = next(self._streams)
        self.plain.streams.add(stream)
        self._handle(messages.StartStream(stream))
        if self.plain.draining:
            self.plain.say("draining", stream, 0, self._drain_seconds())
        self._compare()
        return stream

    def end_stream(self, stream: int) -> None:
        self._handle(messages.EndStream(stream))
        self.plain.end_stream(stream)
        self._compare()
        self.unanswered = {asked for asked in self.unanswered if asked[0] != stream}

    def pause(self, stream: int, paused: bool = True) -> None:
        self._handle(messages.SetStreamPaused(stream, paused))
        (self.plain.paused.add if paused else self.plain.paused.discard)(stream)
        self._compare()

    def drain(self, timeout_seconds: float = 30.0) -> None:
        self._handle(messages.Drain(timeout_seconds))
        self.plain.draining = True
        self._drain_until = self.now + timeout_seconds
        for stream in sorted(self.plain.streams):
            self.plain.say("draining", stream, 0, timeout_seconds)
        self._compare()

    def _drain_seconds(self) -> float:
        return max(0.0, self._drain_until - self.now)

    # Opening.

    def open(
        self,
        stream: int,
        ids: Sequence[str] | None = None,
        *,
        count: int = 1,
        model: str = "fake",
        mode: OpenMode.ValueType = OpenMode.OPEN_MODE_UNSPECIFIED,
        states: Sequence[InitialState] | None = None,
        unary: bool = False,
    ) -> list[int]:
        """Requests, one for each row. unary: all or none, and held by no stream."""
        number = count if ids is None else len(ids)
        requests = [self._ask(stream)] * number if unary else [self._ask(stream) for _ in range(number)]
        command = messages.OpenSessions(
            stream,
            np.array(requests, np.uint64),
            model,
            ids,
            mode,
            Durability.DURABILITY_UNSPECIFIED,
            states,
            all_or_none=unary,
            attach=not unary,
        )
        records = self._handle(command)
        if ids is None:
            given = {record.request: str(record.facts[0]) for record, _ in records if record.kind == "opened"}
            in_order = [str(record.facts[0]) for record, _ in records if record.kind == "opened"]
            ids = in_order if unary else [given.get(request, f"none-{request}") for request in requests]
            ids = ids or [f"none-{place}" for place in range(number)]
        self.plain.open(stream, requests, ids, model, mode, states, all_or_none=unary, attach=not unary)
        self._compare()
        return requests

    def opened(self, stream: int, session_id: str, **settings: Any) -> int:
        """The handle of a session that is opened at once."""
        self.open(stream, [session_id], **settings)
        grip = self.plain.sessions[session_id].grip
        assert grip is not None
        assert grip.handle is not None
        return grip.handle

    # Runs.

    def run(self, stream: int, *rows: Row, outputs: OutputSpec = NO_OUTPUTS) -> list[int]:
        """Submit runs; positions are sent if the first row has one, timeouts and acknowledgements if any has."""
        command = self._command(stream, rows, outputs)
        self._handle(command)
        self._expect_runs([(command, rows)])
        self._compare()
        requests: list[int] = command.requests.tolist()
        return requests

    def run_together(self, *batches: tuple[int, Sequence[Row]], outputs: OutputSpec = NO_OUTPUTS) -> None:
        """Submit runs of several streams in one turn: the engine decides together over those that are alike."""
        commands = [self._command(stream, rows, outputs) for stream, rows in batches]
        self._handle(*commands)
        rest = list(zip(commands, (rows for _, rows in batches), strict=True))
        left = deque[Command](commands)
        while left:
            group = take_alike(left)
            together, rest = rest[: len(group)], rest[len(group) :]
            found = [self._find(int(command.streams[0]), row.session) for command, rows in together for row in rows]
            models = {session.model.name for session in found if not isinstance(session, str)}
            for part in [together] if len(models) < 2 else [[each] for each in together]:
                self._expect_runs(part)
        self._compare()

    def _command(self, stream: int, rows: Sequence[Row], outputs: OutputSpec) -> messages.SubmitRuns:
        requests = [self._ask(stream) for _ in rows]
        by_id = isinstance(rows[0].session, str)
        has_positions = rows[0].position is not None
        flat: list[Any] = [token for row in rows for token in row.tokens]
        tokens, vectors = None, None
        if flat and isinstance(flat[0], tuple):
            vectors = np.array(flat, np.float32)
        else:
            tokens = np.array(flat, np.uint32)
        timeouts, acknowledged = [row.timeout for row in rows], [row.acknowledged for row in rows]
        return messages.SubmitRuns(
            streams=np.full(len(rows), stream),
            requests=np.array(requests, np.uint64),
            handles=None if by_id else np.array([row.session for row in rows], np.uint64),
            session_ids=[str(row.session) for row in rows] if by_id else None,
            counts=np.array([len(row.tokens) for row in rows], np.int64),
            tokens=tokens,
            vectors=vectors,
            positions=np.array([row.position for row in rows], np.int64) if has_positions else None,
            timeouts_seconds=np.array(timeouts) if any(timeouts) else None,
            acknowledged=np.array(acknowledged, np.int64) if any(acknowledged) else None,
            outputs=outputs,
        )

    def submit_raw(self, stream: int, session: int | str, **columns: Any) -> list[str]:
        """One run past the plain sessions, whatever its columns are; returns why it was refused."""
        is_id = isinstance(session, str)
        values: Any = columns.get("vectors", columns.get("tokens"))
        if "tokens" in columns:
            columns["tokens"] = np.array(columns["tokens"], np.uint32)
        command: dict[str, Any] = {
            "streams": np.array([stream]),
            "requests": np.array([next(self._numbers)], np.uint64),
            "handles": None if is_id else np.array([session], np.uint64),
            "session_ids": [session] if is_id else None,
            "counts": np.array([len(values)], np.int64),
            "tokens": None,
            "vectors": None,
            "positions": None,
            "timeouts_seconds": None,
            "acknowledged": None,
            "outputs": NO_OUTPUTS,
            **columns,
        }
        self.engine.handle(messages.SubmitRuns(**command), self.now)
        records = flat_records(self.engine.take_events())
        return [str(record.facts[0]) for record, _ in records]

    def _expect_runs(self, together: Sequence[tuple[messages.SubmitRuns, Sequence[Row]]]) -> None:
        """What comes of commands that are decided over together."""
        plain = self.plain
        first, outputs = together[0][0], together[0][0].outputs
        asked = [
            (stream, request, row)
            for command, rows in together
            for stream, request, row in zip(command.streams.tolist(), command.requests.tolist(), rows, strict=True)
        ]
        found: list[tuple[int, int, Row, PlainSession]] = []
        for stream, request, row in asked:
            session = self._find(stream, row.session)
            if isinstance(session, str):
                plain.refuse(stream, request, session)
            else:
                found.append((stream, request, row, session))
                if first.acknowledged is not None:
                    plain.acknowledge(session, row.acknowledged)
        turns = Counter[int]()
        by_turn: list[tuple[int, int, int, Row, PlainSession]] = []
        for stream, request, row, session in found:
            reason = self._why_invalid(row, session, found[0][3], outputs)
            if reason is None and turns[id(session)] >= self.limits.max_session_pending_tokens:
                reason = "QUEUE_FULL"
            if reason is not None:
                plain.refuse(stream, request, reason)
                continue
            by_turn.append((turns[id(session)], stream, request, row, session))
            turns[id(session)] += 1
        # Rows of a session in their order; between sessions, first rows first.
        for _, stream, request, row, session in sorted(by_turn, key=lambda entry: entry[0]):
            deadline = self.now + row.timeout if row.timeout else np.inf
            position = None if first.positions is None else row.position
            plain.submit(session, stream, request, row.tokens, outputs, position, deadline)

    def _why_invalid(self, row: Row, session: PlainSession, first: PlainSession, outputs: OutputSpec) -> str | None:
        """Why a run cannot be taken, wherever its session stands."""
        model = session.model
        if model is not first.model:
            return "INVALID_INPUT"
        of_vocabulary = outputs.next_token or outputs.top_k or outputs.logprobs
        if outputs.wants and ((outputs.gates and not model.gate_names) or (of_vocabulary and model.vocab_size is None)):
            return "OUTPUT_UNSUPPORTED"
        if not 1 <= len(row.tokens) <= self.limits.max_run_tokens:
            return "INVALID_INPUT"
        values = np.array(row.tokens)
        if model.vocab_size is None:
            return None if values.ndim == 2 and np.isfinite(values).all() else "INVALID_INPUT"
        return None if values.ndim == 1 and values.max() < model.vocab_size else "INVALID_INPUT"

    def acknowledge(self, stream: int, handles: Sequence[int], positions: Sequence[int]) -> None:
        self._handle(messages.Acknowledge(stream, np.array(handles, np.uint64), np.array(positions, np.int64)))
        for handle, position in zip(handles, positions, strict=True):
            session = self.plain.by_handle(stream, handle)
            if not isinstance(session, str):
                self.plain.acknowledge(session, position)
        self._compare()

    def cancel(self, stream: int, *requests: int) -> None:
        self._handle(messages.CancelRuns(stream, np.array(requests, np.uint64)))
        self.plain.cancel(stream, set(requests))
        self._compare()

    def generate(
        self,
        session_id: str,
        max_tokens: int = 8,
        position: int | None = None,
        *,
        stream: int = UNARY,
        temperature: float = 1.0,
        seed: int = 5,
        stop_tokens: tuple[int, ...] = (),
    ) -> int:
        request = self._ask(stream)
        command = SubmitGenerate(
            stream, request, session_id, position, max_tokens, temperature, 0, 1.0, seed, stop_tokens
        )
        self._handle(command)
        session = self.plain.by_id(session_id)
        if isinstance(session, str):
            self.plain.refuse(stream, request, session)
        elif session.model.vocab_size is None:
            self.plain.refuse(stream, request, "OUTPUT_UNSUPPORTED")
        elif any(token >= session.model.vocab_size for token in stop_tokens):
            self.plain.refuse(stream, request, "INVALID_INPUT")
        else:
            self.plain.generate(session, command)
        self._compare()
        return request

    # Operations.

    def reset(self, stream: int, *sessions: int | str) -> list[int]:
        return self._operate(
            stream, sessions, messages.ResetSessions, lambda s, request: self.plain.replace(s, stream, request, None)
        )

    def close(self, stream: int, *sessions: int | str, evicts: bool = False) -> list[int]:
        return self._operate(
            stream,
            sessions,
            lambda target: messages.CloseSessions(target, evicts),
            lambda s, request: self.plain.close(s, stream, request, evicts=evicts),
            refuse_busy=False,
        )

    def export(self, session_id: str) -> int:
        return self._operate(
            UNARY, [session_id], messages.ExportSession, lambda s, request: self.plain.export(s, UNARY, request)
        )[0]

    def import_state(self, session_id: str, state: InitialState) -> int:
        def act(session: PlainSession, request: int) -> None:
            if state.fingerprint != session.model.fingerprint:
                self.plain.refuse(UNARY, request, "STATE_MISMATCH")
            else:
                self.plain.replace(session, UNARY, request, state)

        return self._operate(UNARY, [session_id], lambda target: messages.ImportSession(target, state), act)[0]

    def import_plain(self, session_id: str, position: int, value: float = 5.0) -> int:
        """Import a state of equal numbers."""
        model = self.plain_of(session_id).model
        values = np.full((model.num_layers, model.state_size), value, np.float32)
        return self.import_state(session_id, InitialState(model.fingerprint, position, values))

    def fork(self, session_id: str, fork_id: str) -> int:
        return self._operate(
            UNARY,
            [session_id],
            lambda target: messages.ForkSession(target, fork_id),
            lambda s, request: self.plain.fork(s, UNARY, request, fork_id),
        )[0]

    def get(self, session_id: str) -> int:
        def act(session: PlainSession, request: int) -> None:
            self.plain.say("listed", UNARY, request, (self._facts(session),), 1, False)

        return self._operate(UNARY, [session_id], messages.GetSession, act, refuse_busy=False)[0]

    def _facts(self, session: PlainSession) -> tuple[object, ...]:
        name, attached = session.model.name, session.owner != 0
        return session.id, name, session.position, session.epoch, session.num_pending, attached

    def list_page(self, after: str = "", page_size: int = 100, model: str = "") -> int:
        request = self._ask(UNARY)
        self._handle(messages.ListSessions(UNARY, request, model, after, page_size))
        sessions = sorted((s for s in self.plain.sessions.values() if model in ("", s.model.name)), key=lambda s: s.id)
        following = [s for s in sessions if s.id > after]
        page = tuple(self._facts(s) for s in following[:page_size])
        self.plain.say("listed", UNARY, request, page, len(sessions), len(following) > len(page))
        self._compare()
        return request

    def _operate(
        self,
        stream: int,
        sessions: Sequence[int | str],
        command: Callable[[SessionTarget], Command],
        act: Callable[[PlainSession, int], None],
        *,
        refuse_busy: bool = True,
    ) -> list[int]:
        requests = [self._ask(stream) for _ in sessions]
        numbers = np.array(requests, np.uint64)
        if isinstance(sessions[0], str):
            target = SessionTarget(stream, numbers, session_ids=[str(session) for session in sessions])
        else:
            target = SessionTarget(stream, numbers, np.array(sessions, np.uint64))
        self._handle(command(target))
        for request, named in zip(requests, sessions, strict=True):
            session = self._find(stream, named)
            if isinstance(session, str):
                self.plain.refuse(stream, request, session)
            elif refuse_busy and session.generate is not None:
                self.plain.refuse(stream, request, "SESSION_BUSY")
            else:
                act(session, request)
        self._compare()
        return requests

    def end(self) -> None:
        """Let everything finish and close every session; nothing may be left."""
        for stream in sorted(self.plain.paused):
            self.pause(stream, paused=False)
        self.settle()
        assert not self.unanswered, self.unanswered
        for session_id in sorted(self.plain.sessions):
            self.export(session_id)
            self.close(UNARY, session_id)
        assert not self.unanswered, self.unanswered
        check_nothing_left(self.engine.core)
        # Events are written to the wire some time later: nothing that has happened since may have changed them.
        assert all(flat_records(events) == records for events, records in self._taken)
