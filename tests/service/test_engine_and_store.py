"""What went wrong between engine and store once, or nearly: each as two replicas and a few commands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service import messages
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import SessionTarget
from cellserve_service.outputs import NO_OUTPUTS
from cellserve_service.sessions import NO_STREAM, Durability
from tests.service.fleet import Fleet, Replica
from tests.service.keeping_client import KeepingClient, Line, flipped
from tests.service.plain_store import Living
from tests.service.records import Record
from tests.service.side_by_side import TOKENS, UNARY

LIMITS = EngineLimits(max_sessions=6)


class Pair:
    """Two replicas, and all that they say."""

    def __init__(self, limits: EngineLimits = LIMITS) -> None:
        self.fleet = Fleet(limits, model=TOKENS, num_slots=2, max_batch=2)
        self.first, self.second = self.fleet.replicas
        self.said: list[Record] = []
        self.fleet.listeners.append(lambda replica, record, handle: self.said.append(record))
        self.streams = {replica: replica.new_stream() for replica in self.fleet.replicas}

    def client(self, name: str, durability: int, replica: Replica | None = None) -> KeepingClient:
        """A session that is opened."""
        client = KeepingClient(self.fleet, name, durability, holder=len(self.fleet.listeners))
        self.open(client, replica or self.first, OpenMode.OPEN_MODE_CREATE)
        self.settle()
        return client

    def open(
        self, client: KeepingClient, replica: Replica, mode: OpenMode.ValueType = OpenMode.OPEN_MODE_ATTACH
    ) -> None:
        client.open(replica, self.streams[replica], mode=mode, state=None)

    def run(self, client: KeepingClient, *tokens: int) -> None:
        client.add_run(list(tokens), NO_OUTPUTS)
        client.send(self.first)

    def settle(self) -> None:
        for replica in self.fleet.replicas:
            replica.settle()

    def ask_to_open(
        self, replica: Replica, name: str, mode: OpenMode.ValueType, durability: int, *, holder: int = 0
    ) -> None:
        stream = self.streams[replica]
        [request] = replica.ask(stream)
        holders = np.array([holder], np.uint64) if holder else None
        requests = np.array([request], np.uint64)
        replica.handle(
            messages.OpenSessions(
                stream,
                requests,
                TOKENS.name,
                [name],
                mode,
                durability,  # type: ignore[arg-type]
                None,
                holders=holders,
            )
        )

    def kinds(self) -> list[str]:
        """What was said since the last time; of failures the reason."""
        kinds = [str(record.facts[0]) if record.kind == "failed" else record.kind for record in self.said]
        self.said.clear()
        return kinds


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_reset_is_stored_though_the_run_before_it_was_written_after_its_epoch_had_begun(pair: Pair) -> None:
    client = pair.client("a", Durability.SYNC)
    pair.run(client, 1, 2)
    client.begin_op("reset", target=Line(TOKENS, 0, TOKENS.zero_state()))
    assert client.op is not None
    client.send_op(pair.first, client.op)
    pair.settle()
    # The client has checked that the zero state was stored when it was told so.
    assert client.is_settled
    row = pair.fleet.living("a")
    assert row is not None
    assert row.position == 0


def test_nothing_is_told_as_durable_of_a_state_that_is_still_to_come(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    pair.run(client, 1, 2, 3)
    pair.settle()
    pair.run(client, *[1] * 40)
    pair.first.tick()
    pair.first.checkpoint()
    client.begin_op("reset", target=Line(TOKENS, 0, TOKENS.zero_state()))
    assert client.op is not None
    client.send_op(pair.first, client.op)
    pair.kinds()
    pair.open(client, pair.first)
    pair.first.apply()
    pair.first.reply()
    [opened] = [record for record in pair.said if record.kind == "opened"]
    assert opened.facts[1] == opened.facts[4] == 0
    pair.first.tick()
    pair.first.apply()
    pair.first.reply()
    told = [record.facts[0] for record in pair.said if record.kind == "durable"]
    assert set(told) <= {0}


def test_runs_before_a_close_are_answered_when_the_end_is_stored(pair: Pair) -> None:
    client = pair.client("a", Durability.SYNC)
    pair.run(client, 1, 2)
    client.begin_op("close")
    assert client.op is not None
    client.send_op(pair.first, client.op)
    pair.kinds()
    pair.first.tick()
    assert pair.kinds() == []
    pair.settle()
    assert pair.kinds() == ["answer", "done"]


def test_an_id_whose_session_still_ends_is_opened_after_that(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    pair.run(client, 1, 2)
    targets = [SessionTarget(UNARY, np.array(pair.first.ask(UNARY), np.uint64), session_ids=["a"]) for _ in range(2)]
    pair.first.handle(messages.CloseSessions(targets[0]))
    pair.ask_to_open(pair.first, "a", OpenMode.OPEN_MODE_CREATE, Durability.PERIODIC)
    pair.first.handle(messages.GetSession(targets[1]))
    pair.kinds()
    pair.settle()
    assert pair.kinds() == ["answer", "done", "opened", "listed"]
    row = pair.fleet.living("a")
    assert row is not None
    assert row.position == 0


def test_a_replica_that_does_not_hear_of_having_claimed_a_session_back_overwrites_nothing(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    stale = pair.fleet.living("a")
    assert stale is not None
    pair.open(client, pair.second)
    pair.settle()
    pair.run(client, 1, 2)
    pair.second.settle()
    pair.second.checkpoint()
    pair.second.settle()
    # The first one still has the session at position 0, and is not told what its claim has come to.
    pair.ask_to_open(pair.first, "a", OpenMode.OPEN_MODE_ATTACH, Durability.NONE, holder=77)
    pair.first.fail(applied=True)
    pair.first.reply()
    row = pair.first.engine.core.sessions.row_by_id["a"]
    assert pair.first.engine.keeping is not None
    pair.first.engine.keeping.changed(row)
    pair.first.checkpoint()
    pair.kinds()
    pair.first.settle()
    stored = pair.fleet.living("a")
    assert stored is not None
    assert stored.position == 2
    assert "a" not in pair.first.engine.core.sessions.row_by_id


def test_a_session_that_comes_back_to_a_replica_which_still_had_it_comes_as_it_is_stored(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    client.detach()
    pair.settle()
    for _ in range(2):
        client.add_run([3], NO_OUTPUTS)
    # Two calls bring it back here; between them the other replica has it.
    client.echo(pair.first, client.runs[0])
    pair.first.apply()
    client.echo(pair.first, client.runs[1])
    pair.first.reply()
    for run in client.runs:
        client.echo(pair.second, run)
        pair.second.settle()
    pair.second.checkpoint()
    pair.second.settle()
    pair.kinds()
    pair.first.apply()
    pair.first.reply()
    # The one that had begun here is refused, the other one has run there.
    assert pair.kinds() == ["SESSION_MOVED", "answer"]


def test_a_session_that_is_claimed_is_not_left_to_the_store(pair: Pair) -> None:
    client = pair.client("a", Durability.SYNC)
    pair.run(client, 1)
    client.detach()
    pair.open(client, pair.first)
    pair.kinds()
    pair.settle()
    assert pair.kinds()[-1] == "opened"
    assert "a" in pair.first.engine.core.sessions.row_by_id


def test_without_the_store_a_durable_session_is_attached_by_nobody(pair: Pair) -> None:
    pair.client("a", Durability.PERIODIC)
    pair.kinds()
    pair.ask_to_open(pair.first, "a", OpenMode.OPEN_MODE_ATTACH_OR_CREATE, Durability.NONE)
    pair.ask_to_open(pair.first, "b", OpenMode.OPEN_MODE_ATTACH_OR_CREATE, Durability.NONE)
    pair.first.fail(applied=False)
    pair.first.reply()
    assert pair.kinds() == ["STORE_UNAVAILABLE", "opened"]


def test_a_stream_that_ended_while_the_store_was_asked_holds_no_session(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    client.detach()
    pair.settle()
    pair.ask_to_open(pair.first, "a", OpenMode.OPEN_MODE_ATTACH, Durability.NONE)
    pair.first.end_stream(pair.streams[pair.first])
    pair.settle()
    sessions = pair.first.engine.core.sessions
    assert sessions.owner[sessions.row_by_id["a"]] == NO_STREAM


def test_of_two_sessions_created_at_once_under_one_id_the_second_is_refused(pair: Pair) -> None:
    for _ in range(2):
        pair.ask_to_open(pair.first, "a", OpenMode.OPEN_MODE_CREATE, Durability.NONE)
    pair.settle()
    assert pair.kinds() == ["opened", "SESSION_EXISTS"]


def test_a_fork_whose_id_was_opened_meanwhile_takes_its_place(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    pair.ask_to_open(pair.first, "f", OpenMode.OPEN_MODE_ATTACH_OR_CREATE, Durability.NONE)
    client.begin_op("fork", name="f")
    assert client.op is not None
    client.send_op(pair.first, client.op)
    pair.kinds()
    pair.settle()
    assert pair.kinds() == ["opened", "ended", "forked"]


def test_a_session_that_has_expired_here_and_lives_elsewhere_is_not_said_to_have_ended(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    pair.open(client, pair.second)
    pair.settle()
    pair.fleet.now += 3601
    pair.first.sweep()  # it has not heard that the session is another's
    pair.first.fail(applied=False)
    pair.first.reply()
    pair.kinds()
    [request] = pair.first.ask(UNARY)
    target = SessionTarget(UNARY, np.array([request], np.uint64), session_ids=["a"])
    pair.first.handle(messages.GetSession(target))
    assert pair.kinds() == ["STORE_UNAVAILABLE"]


def test_a_mark_that_is_missing_is_looked_for_where_the_session_is(pair: Pair) -> None:
    client = pair.client("a", Durability.PERIODIC)
    pair.open(client, pair.second)
    pair.settle()
    client.begin_op("checkpoint", name="one")
    assert client.op is not None
    client.send_op(pair.second, client.op)
    pair.settle()
    client.begin_op("rollback", name="one", target=Line(TOKENS, *client.marks["one"]))
    assert client.op is not None
    pair.kinds()
    client.send_op(pair.first, client.op)
    pair.settle()
    assert pair.kinds() == ["ended", "SESSION_MOVED"]
    client.send_op(pair.first, client.op)
    pair.settle()
    assert client.is_settled


def test_a_generate_that_is_broken_off_is_refused_after_its_tokens(pair: Pair) -> None:
    client = pair.client("a", Durability.SYNC)
    client.add_generate(30, seed=21)
    client.send(pair.first)
    pair.first.tick()
    pair.kinds()
    [key] = client.asked
    pair.first.handle(messages.CancelRuns(UNARY, np.array([key[2]], np.uint64)))
    assert pair.kinds() == []
    pair.first.apply()
    pair.first.reply()
    assert [kind for kind in pair.kinds() if kind != "durable"] == ["generated", "RUN_CANCELLED"]


def test_a_damaged_row_is_refused_by_name_and_nothing_else(pair: Pair) -> None:
    clients = [pair.client(name, Durability.PERIODIC) for name in "ab"]
    for client in clients:
        pair.run(client, 1)
        client.detach()
    pair.settle()
    found = pair.fleet.store._sessions["a"]
    assert isinstance(found, Living)
    clients[0].is_damaged = True
    pair.fleet.store._sessions["a"] = replace(found, row=replace(found.row, blob=flipped(found.row.blob, 40)))
    pair.kinds()
    for client in clients:
        pair.open(client, pair.second)
    pair.settle()
    assert pair.kinds() == ["STATE_DAMAGED", "opened"]
    clients[0].begin_op("close")
    assert clients[0].op is not None
    clients[0].send_op(pair.second, clients[0].op)
    pair.settle()
    assert not clients[0].is_open


def test_a_session_that_is_closed_between_two_opens_is_closed_for_the_second(pair: Pair) -> None:
    """The second has claimed it by then, and hears of it only when its end is on its way to the store."""
    first = pair.first
    pair.ask_to_open(first, "a", OpenMode.OPEN_MODE_ATTACH_OR_CREATE, Durability.PERIODIC)
    first.apply()
    pair.ask_to_open(first, "a", OpenMode.OPEN_MODE_ATTACH, Durability.PERIODIC)
    first.reply()
    first.apply()
    requests = np.array(first.ask(UNARY), np.uint64)
    first.handle(messages.CloseSessions(SessionTarget(UNARY, requests, session_ids=["a"])))
    pair.settle()
    assert sorted(pair.kinds()) == ["SESSION_CLOSED", "done", "ended", "opened"]
    assert "a" not in first.engine.core.sessions.row_by_id
    assert pair.fleet.living("a") is None


def test_a_call_that_has_claimed_a_session_before_it_was_closed_comes_too_late(pair: Pair) -> None:
    first = pair.first
    pair.client("a", Durability.PERIODIC, pair.second)
    targets = [SessionTarget(UNARY, np.array(first.ask(UNARY), np.uint64), session_ids=["a"]) for _ in range(3)]
    pair.kinds()
    first.handle(messages.ResetSessions(targets[0]))
    first.apply()
    first.handle(messages.ResetSessions(targets[1]))
    first.reply()
    first.apply()
    first.handle(messages.CloseSessions(targets[2]))
    pair.settle()
    assert sorted(pair.kinds()) == ["SESSION_CLOSED", "done", "done"]
    assert "a" not in first.engine.core.sessions.row_by_id
    assert pair.fleet.living("a") is None


def test_a_session_that_is_closed_while_its_damaged_state_is_loaded_ends() -> None:
    pair = Pair(replace(LIMITS, max_parked_states=0))
    clients = [pair.client(name, Durability.PERIODIC) for name in "abc"]
    for client in clients:  # two slots: the first is parked, and left to the store
        pair.run(client, 1)
        pair.first.tick()
    pair.first.checkpoint()
    pair.settle()
    pair.first.sweep()
    row = pair.first.engine.core.sessions.row_by_id["a"]
    assert pair.first.engine.core.sessions.is_in_store[row]
    found = pair.fleet.store._sessions["a"]
    assert isinstance(found, Living)
    clients[0].is_damaged = True
    pair.fleet.store._sessions["a"] = replace(found, row=replace(found.row, blob=flipped(found.row.blob, 40)))
    pair.run(clients[0], 2)
    clients[0].begin_op("close")
    assert clients[0].op is not None
    clients[0].send_op(pair.first, clients[0].op)
    pair.kinds()
    pair.settle()
    assert "STATE_DAMAGED" in pair.kinds()
    assert not pair.first.engine.core.sessions.is_open[row]


def test_a_session_that_has_left_while_the_store_was_asked_is_created_as_durable_as_it_was_asked_for(
    pair: Pair,
) -> None:
    first, second = pair.first, pair.second
    pair.client("a", Durability.PERIODIC)
    pair.ask_to_open(second, "a", OpenMode.OPEN_MODE_ATTACH, Durability.PERIODIC)
    second.apply()
    second.reply()
    second.handle(
        messages.CloseSessions(SessionTarget(UNARY, np.array(second.ask(UNARY), np.uint64), session_ids=["a"]))
    )
    second.apply()
    second.reply()
    pair.ask_to_open(first, "a", OpenMode.OPEN_MODE_ATTACH_OR_CREATE, Durability.PERIODIC)
    first.apply()
    first.handle(messages.MovedAway("a", 1 << 20))
    pair.kinds()
    pair.settle()
    assert pair.kinds() == ["opened"]
    row = first.engine.core.sessions.row_by_id["a"]
    assert first.engine.core.sessions.is_durable(row)
    assert pair.fleet.living("a") is not None
