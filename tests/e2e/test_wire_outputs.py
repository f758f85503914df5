"""Outputs of every kind at every token, at the last and at none; and those that a model does not have."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.conftest import CELLS
from tests.support.comparing import assert_outputs
from tests.support.refusals import expect, of_call
from tests.support.stream import RawStream, outputs
from tests.support.stream_events import unpack
from tests.support.wire import Follower, Wire, step_request

pytestmark = pytest.mark.usefixtures("witnesses")

TOKEN_KINDS: list[dict[str, Any]] = [
    {"next_token": True},
    {"top_k": 4},
    {"logprobs": True},
    {"head_outputs": True},
    {"states": True},
    {"gates": True},
    {"next_token": True, "top_k": 11, "logprobs": True, "head_outputs": True, "states": True, "gates": True},
]


def without_gates(kind: dict[str, Any], cell: str) -> dict[str, Any]:
    return {name: value for name, value in kind.items() if name != "gates" or cell != "vanilla_rnn"}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("at", ["every", "last"])
def test_a_token_model_gives_what_is_asked_and_nothing_else(wire: Wire, stream: RawStream, cell: str, at: str) -> None:
    model = "tiny-gru" if cell == "gru" else f"tiny-{cell}"
    handle = stream.open(model).handle
    random = np.random.default_rng(1)
    consumed: list[int] = []
    for wanted in filter(None, (without_gates(kind, cell) for kind in TOKEN_KINDS)):
        for number in (1, 2, 50):
            run = random.integers(0, 11, number).tolist()
            answer = stream.step(handle, run, outputs(at, **wanted), position=len(consumed))
            consumed += run
            trace = wire.oracle(model).run(consumed)
            assert_outputs(answer.outputs, wanted, trace, consumed, number if at == "every" else 1)


@pytest.mark.parametrize("cell", CELLS)
def test_a_vector_model_gives_what_is_asked(wire: Wire, stream: RawStream, cell: str) -> None:
    model = f"vectors-{cell}"
    handle = stream.open(model).handle
    vectors = np.random.default_rng(2).standard_normal((40, 3))
    wanted = without_gates({"head_outputs": True, "states": True, "gates": True}, cell)
    for first, end in ((0, 1), (1, 40)):
        answer = stream.step(handle, vectors[first:end], outputs(**wanted))
        trace = wire.oracle(model).run(vectors.astype(np.float32)[:end])
        assert_outputs(answer.outputs, wanted, trace, None, end - first)


@pytest.mark.parametrize("at", ["none", "unspecified"])
def test_at_none_nothing_is_given_whatever_else_is_asked(session: Follower, at: str) -> None:
    wanted = outputs(at, top_k=5, next_token=True, logprobs=True, head_outputs=True, states=True, gates=True)
    answer = session.stream.step(session.handle, [1, 2], wanted)
    assert (answer.position, answer.num_tokens, answer.outputs) == (5, 2, {})
    session.consumed([1, 2])


def test_a_run_without_outputs_is_told_of_once(session: Follower) -> None:
    answer = session.stream.step(session.handle, [1] * 500, outputs("last", next_token=True))
    assert (answer.num_slices, answer.num_tokens) == (1, 500)
    assert session.stream.step(session.handle, [1] * 500).num_slices == 1
    session.consumed([1] * 1000)


def test_a_frame_may_ask_for_different_outputs_of_runs_of_different_lengths(wire: Wire, stream: RawStream) -> None:
    handles = [one.handle for one in stream.open_many("tiny-lstm", 8)]
    consumed: list[list[int]] = [[] for _ in handles]
    commands = []
    checks: list[Callable[[], None]] = []
    for place, kind in enumerate([*TOKEN_KINDS, *TOKEN_KINDS]):
        at = ("every", "last")[place % 2]
        runs = [[(place + row) % 11] * (1 + (place * row) % 40) for row in range(8)]
        positions = list(map(len, consumed))
        command, requests = stream.running(handles, runs, outputs(at, **kind), positions=positions)
        commands.append(command)
        for row, (run, request) in enumerate(zip(runs, requests, strict=True)):
            consumed[row] += run
            rows = len(run) if at == "every" else 1
            checks.append(partial(_check_answer, wire, stream, request, kind, list(consumed[row]), rows))
    stream.send(*commands)
    for check in checks:
        check()


def _check_answer(
    wire: Wire, stream: RawStream, request: int, kind: dict[str, Any], consumed: list[int], num_rows: int
) -> None:
    answer = stream.answer(request)
    assert answer.position == len(consumed)
    assert_outputs(answer.outputs, kind, wire.oracle("tiny-lstm").run(consumed), consumed, num_rows)


@pytest.mark.parametrize("at", ["every", "last"])
def test_a_unary_step_gives_the_same_outputs(wire: Wire, at: str) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    response = wire.step(session_id, tokens, outputs(at, **TOKEN_KINDS[-1]))
    assert response.position == 8
    rows = 8 if at == "every" else 1
    found = unpack(response.outputs, rows, 11)
    assert_outputs(found, TOKEN_KINDS[-1], wire.oracle("tiny-gru").run(tokens), tokens, rows)


LACKING = [
    ("headless", {"next_token": True}),
    ("headless", {"top_k": 1}),
    ("headless", {"logprobs": True}),
    ("headless", {"head_outputs": True}),
    ("vectors-gru", {"next_token": True}),
    ("vectors-gru", {"top_k": 1}),
    ("vectors-gru", {"logprobs": True}),
    ("tiny-vanilla_rnn", {"gates": True}),
    ("vectors-vanilla_rnn", {"gates": True}),
]


@pytest.mark.parametrize(("model", "kind"), LACKING, ids=str)
def test_an_output_that_the_model_does_not_have_is_refused(
    wire: Wire, stream: RawStream, model: str, kind: dict[str, Any]
) -> None:
    session = Follower(wire, stream, model)
    run = np.ones((2, 3)) if model.startswith("vectors") else [1, 2]
    session.step(run)
    for at in ("every", "last"):
        expect(session.refuse(run, outputs(at, states=True, **kind)), "OUTPUT_UNSUPPORTED")
        request = step_request(session.id, run, outputs(at, **kind))
        with wire.unmoved(session.id):
            refused = of_call(partial(wire.sessions.Step, request))
            expect(refused, "OUTPUT_UNSUPPORTED", field="outputs")
    # At none nothing is computed, so nothing is lacking.
    stream.step(session.handle, run, outputs("none", **kind))
    session.consumed(run)
    session.step(run)
