"""What an engine says, as flat records: one for each request answered, comparable with what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from cellserve_service import messages
from cellserve_service.errors import reason_name
from cellserve_service.messages import Event
from cellserve_service.outputs import At, OutputArrays, OutputSpec
from tests.support.steppers import FakeModel, Outputs

__all__ = ["OutputRow", "Record", "expected_row", "flat_records", "row_words"]

# One output row: the arrays' names and bytes.
OutputRow = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Record:
    """One thing said to a stream about one request, or about none (0)."""

    kind: str
    stream: int
    request: int
    facts: tuple[object, ...]

    def sort_key(self) -> tuple[object, ...]:
        return self.kind, self.stream, self.request, repr(self.facts)


def expected_row(spec: OutputSpec, outputs: Outputs) -> OutputRow:
    """The output row that a spec asks for at a token."""
    row: list[tuple[str, bytes]] = []
    if spec.next_token:
        row.append(("next_tokens", np.uint32(outputs.logits.argmax()).tobytes()))
    if spec.top_k:
        tokens, logprobs = outputs.top(spec.top_k)
        row += [("top_tokens", tokens.tobytes()), ("top_logprobs", logprobs.tobytes())]
    if spec.logprobs:
        row.append(("logprobs", np.float32(outputs.logprob).tobytes()))
    if spec.head_outputs:
        row.append(("head_outputs", outputs.logits.tobytes()))
    if spec.states:
        row.append(("states", outputs.state.tobytes()))
    if spec.gates:
        row.append(("gates", outputs.gates.astype(np.float32).tobytes()))
    return tuple(row)


def row_words(spec: OutputSpec, model: FakeModel) -> int:
    """4-byte words of one output row."""
    if spec.at is At.NONE:
        return 0
    words = spec.next_token + 2 * spec.top_k + spec.logprobs
    words += (model.output_size or 0) if spec.head_outputs else 0
    words += model.num_layers * model.state_size if spec.states else 0
    return words + (len(model.gate_names) * model.num_layers * model.hidden_size if spec.gates else 0)


def flat_records(events: Sequence[Event]) -> list[tuple[Record, int]]:
    """Every event's rows as records, each with the handle that it tells, or 0."""
    return [pair for event in events for pair in _flat(event)]


def _flat(event: Event) -> Iterator[tuple[Record, int]]:
    match event:
        case messages.Answers():
            yield from _answers(event)
        case messages.Failures():
            for request, refusal in zip(event.requests.tolist(), event.refusals, strict=True):
                yield Record("failed", event.stream, request, (reason_name(refusal.reason), refusal.position)), 0
        case messages.Opened():
            columns = (event.requests, event.session_ids, event.positions, event.epochs, event.created, event.handles)
            for place, (request, session_id, position, epoch, created, handle) in enumerate(zip(*columns, strict=True)):
                opened: tuple[object, ...] = (session_id, int(position), int(epoch), bool(created))
                if event.durable_positions is not None:
                    opened += (int(event.durable_positions[place]), int(event.durabilities[place]))
                yield Record("opened", event.stream, int(request), opened), int(handle)
        case messages.DurablePositions():
            for handle, position in zip(event.handles.tolist(), event.positions.tolist(), strict=True):
                yield Record("durable", event.stream, 0, (position,)), handle
        case messages.Done():
            for request, handle, epoch, position in zip(
                event.requests.tolist(), event.handles.tolist(), event.epochs, event.positions, strict=True
            ):
                yield Record("done", event.stream, request, (int(epoch), int(position), handle == 0)), handle
        case messages.SessionEnded():
            for handle in event.handles.tolist():
                yield Record("ended", event.stream, 0, (reason_name(event.reason),)), handle
        case messages.Generated():
            generated = (
                tuple(event.tokens.tolist()),
                event.logprobs.tobytes(),
                event.position,
                event.finished,
                event.stopped,
                event.seed,
            )
            yield Record("generated", event.stream, event.request, generated), 0
        case messages.StateExported():
            exported = (event.state.fingerprint, event.state.position, event.state.values.tobytes())
            yield Record("exported", event.stream, event.request, exported), 0
        case messages.SessionForked():
            forked = (event.session_id, event.position, event.epoch)
            yield Record("forked", event.stream, event.request, forked), 0
        case messages.SessionsListed():
            facts = tuple(
                (s.session_id, s.model, s.position, s.epoch, s.num_pending_tokens, s.attached) for s in event.sessions
            )
            yield Record("listed", event.stream, event.request, (facts, event.total_size, event.more)), 0
        case messages.Draining():
            yield Record("draining", event.stream, 0, (event.timeout_seconds,)), 0
        case messages.Drained():
            yield Record("drained", 0, 0, ()), 0


def _answers(event: messages.Answers) -> Iterator[tuple[Record, int]]:
    assert len(event.accepted_at) == len(event.requests)
    assert sorted(event.streams.tolist()) == event.streams.tolist()
    for place, request in enumerate(event.requests.tolist()):
        one = event.rows(place, place + 1)
        rows = tuple(_output_rows(one.outputs, int(one.num_output_rows[0])))
        facts = (int(one.positions[0]), int(one.counts[0]), int(one.remaining[0]), rows)
        yield Record("answer", int(one.streams[0]), request, facts), 0


def _output_rows(outputs: OutputArrays, number: int) -> Iterator[OutputRow]:
    names = [field.name for field in fields(outputs) if getattr(outputs, field.name) is not None]
    assert all(len(getattr(outputs, name)) == number for name in names)
    for row in range(number):
        yield tuple((name, np.ascontiguousarray(getattr(outputs, name)[row]).tobytes()) for name in names)
