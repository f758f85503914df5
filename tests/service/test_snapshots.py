"""What is copied of a session comes back with it: its state, its held answers in their order, its generates' slices."""

from __future__ import annotations

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import NO_OUTPUTS, At, OutputSpec
from cellserve_service.runs import NOT_HELD
from cellserve_service.sessions import Durability
from tests.service.fleet import Fleet, Replica
from tests.service.keeping_client import KeepingClient
from tests.service.side_by_side import TOKENS

SPECS = (
    NO_OUTPUTS,
    OutputSpec(at=At.LAST, states=True, top_k=2),
    OutputSpec(at=At.EVERY, next_token=True, logprobs=True),
    OutputSpec(at=At.EVERY, head_outputs=True, gates=True),
)


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet(EngineLimits(max_sessions=6, max_held_answer_bytes=400), model=TOKENS, num_slots=2, max_batch=4)
    for replica in fleet.replicas:
        replica.new_stream()
    return fleet


def _worked(fleet: Fleet, name: str) -> KeepingClient:
    """A session that has run and generated a good deal, and is stored."""
    first = fleet.replicas[0]
    client = KeepingClient(fleet, name, Durability.SYNC, holder=7)
    client.open(first, min(first.streams), mode=OpenMode.OPEN_MODE_CREATE, state=None)
    first.settle()
    for number, spec in enumerate(SPECS):
        client.add_run([number, 5, 1][: 1 + number % 3], spec)
        client.send(first)
        first.settle()
    client.add_generate(25, seed=21)
    client.send(first)
    first.settle()
    assert client.is_settled
    return client


def _held(replica: Replica, name: str) -> list[tuple[object, ...]]:
    core = replica.engine.core
    row, runs = core.sessions.row_by_id[name], core.served[0].runs
    return [
        (
            int(runs.start[run]),
            int(runs.count[run]),
            int(runs.digest[run]),
            int(runs.kind[run]),
            core.served[0].specs.specs[int(runs.spec[run])] if runs.kind[run] == 0 else None,
            runs.held[run] != NOT_HELD,
            runs.held_answer(run).tobytes(),
        )
        for run in runs.chain(row)
    ]


def test_held_answers_come_back_in_their_order_with_what_they_were_asked_for(fleet: Fleet) -> None:
    first, second = fleet.replicas
    clients = [_worked(fleet, name) for name in "ab"]
    held = {client.id: _held(first, client.id) for client in clients}
    assert all(len(answers) >= 4 for answers in held.values())
    for client in reversed(clients):
        client.open(second, min(second.streams), mode=OpenMode.OPEN_MODE_ATTACH, state=None)
    second.settle()
    assert {client.id: _held(second, client.id) for client in clients} == held


def test_every_answer_that_is_held_is_given_again_by_another_server(fleet: Fleet) -> None:
    second = fleet.replicas[1]
    client = _worked(fleet, "a")
    held = {fact[0] for fact in _held(fleet.replicas[0], "a")}
    client.open(second, min(second.streams), mode=OpenMode.OPEN_MODE_ATTACH, state=None)
    second.settle()
    repeated = [run for run in client.runs if run.position in held]
    assert repeated[-1].seed is not None
    for run in repeated:
        run.answered = False
        # The client compares each with the quiet run.
        if run.seed is None:
            client.echo(second, run)
        else:
            client.send_generate(second, run)
    assert all(run.answered for run in repeated)
    assert not second.tick()


def test_a_snapshot_is_not_changed_by_what_runs_afterwards(fleet: Fleet) -> None:
    first = fleet.replicas[0]
    client = _worked(fleet, "a")
    first.engine.keeping.changed(0) if first.engine.keeping is not None else None
    first.engine.begin_checkpoint(fleet.now)
    first.engine.write_due(fleet.now)
    [write] = first.engine.take_store_requests()
    before = write.snapshot.encode()  # type: ignore[union-attr]
    first.keeper.submit([write])
    client.add_run([1, 2, 3], SPECS[1])
    client.send(first)
    first.tick()
    assert write.snapshot.encode() == before  # type: ignore[union-attr]
    first.settle()
    row = fleet.living("a")
    assert row is not None
    assert row.position == client.runs[-1].end
    assert np.isfinite(row.expires_at)
