"""Two servers on one Redis: a session is one server's at a time, and goes from one to the other whole."""

from collections.abc import Callable
from functools import partial

import pytest
from redis import Redis

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import generate
from tests.support.metrics import Metrics
from tests.support.refusals import expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import outputs
from tests.support.wire import Follower

DURABILITIES = pytest.mark.parametrize("durability", ["PERIODIC", "SYNC"])


@pytest.fixture
def store_url(redis_url: str) -> str:
    return redis_url


@pytest.fixture
def first(start_replica: StartReplica, store_url: str) -> Replica:
    return start_replica()


@pytest.fixture
def second(start_replica: StartReplica, store_url: str) -> Replica:
    return start_replica()


def held(replica: Replica, durability: str, session_id: str = "s") -> Follower:
    """A session that a server holds, and the store has as it is."""
    session = replica.session(session_id, durability)
    session.step([1, 2, 3])
    replica.stream.durable(session.handle, 3)
    return session


@DURABILITIES
def test_attaching_elsewhere_takes_a_session_from_a_live_server(
    first: Replica, second: Replica, durability: str
) -> None:
    session = held(first, durability)
    epochs = [first.get("s").epoch]
    for number in range(6):
        loser, taker = (first, second) if number % 2 == 0 else (second, first)
        lost = session.handle
        epochs.append(taker.attach(session).epoch)
        loss = loser.stream.loss()
        assert (loss.handle, loss.reason) == (lost, "SESSION_MOVED")
        expect(loser.stream.refuse(lost, [1]), "SESSION_MOVED")
        expect(loser.stream.refusal(loser.stream.detach(lost)), "SESSION_MOVED")
        session.step([number, 4])
        taker.stream.durable(session.handle, session.position)
        taker.check_exactly(session)
    assert epochs == sorted(set(epochs))
    assert Metrics.of(first.server).value("cellserve_sessions", model=MODEL, tier="device") <= 1


def test_what_waits_for_a_session_that_is_taken_is_refused(start_replica: StartReplica, second: Replica) -> None:
    length = 60_000
    first = start_replica(max_run_tokens=length, max_session_pending_tokens=2 * length)
    session = held(first, "SYNC")
    handle, runs = session.handle, [[token] * length for token in range(2)]
    wanted = outputs("every", next_token=True)  # in slices
    requests = first.stream.run([handle] * 2, runs, wanted, positions=[3, 3 + length])
    while first.get("s").position == 3:
        pass
    second.attach(session)  # where it was durable
    for request in requests:
        expect(first.stream.refusal(request), "SESSION_MOVED")
    assert first.stream.loss().handle == handle
    session.step([4])
    second.check_exactly(session)


@DURABILITIES
def test_a_server_that_was_taken_for_dead_writes_nothing_any_more(
    first: Replica, second: Replica, redis_url: str, durability: str
) -> None:
    session = held(first, durability)
    handle = session.handle
    first.pause()
    # What comes while it stands still, and what nobody will tell it.
    request = first.stream.run([handle], [[9, 9]], outputs("last", next_token=True), positions=[3])[0]
    with Redis.from_url(redis_url) as client:
        client.client_kill_filter(_type="pubsub")
    second.attach(session)
    session.step([4, 5])
    second.stream.durable(session.handle, 5)
    first.resume()
    loss = first.stream.loss()
    assert (loss.handle, loss.reason) == (handle, "SESSION_MOVED")
    if durability == "SYNC":
        expect(first.stream.refusal(request), "SESSION_MOVED")
    metrics = Metrics.wait(first.server, lambda found: found.value("cellserve_fenced_writes_total") > 0)
    assert metrics.value("cellserve_fenced_writes_total") == 1
    expect(first.stream.refuse(handle, [1]), "SESSION_MOVED")
    assert first.get("s").position == 5
    session.step([6])
    second.check_exactly(session)
    second.crash()
    second.attach(session) if durability == "SYNC" else second.attach_by_id("s")
    assert second.wire.state("s") == second.quiet_state(session.tokens[: second.get("s").position])


def read_elsewhere(replica: Replica, session: Follower) -> None:
    assert replica.get("s").position == session.position
    assert replica.wire.state("s") == replica.quiet_state(session.tokens)
    listed = replica.wire.sessions.ListSessions(pb.ListSessionsRequest()).sessions
    assert [one.id for one in listed] == ["s"]
    copy = replica.fork("s").session_id
    assert replica.wire.state(copy) == replica.quiet_state(session.tokens)
    replica.close(copy)


def test_who_only_looks_takes_nothing_from_the_other_server(first: Replica, second: Replica) -> None:
    session = held(first, "SYNC")
    for _ in range(3):
        read_elsewhere(second, session)
        session.step([4, 5])
    assert not first.stream.lost_handles
    assert first.get("s").epoch == 1


def step(replica: Replica, session: Follower) -> None:
    assert replica.wire.step("s", [4], position=3).position == 4
    session.consumed([4])


def sample(replica: Replica, session: Follower) -> None:
    session.wire = replica.wire
    session.consumed(generate(session, max_tokens=40, seed=5).tokens)


def import_state(replica: Replica, session: Follower) -> None:
    replica.import_state("s", replica.quiet_state([7, 7]))
    session.tokens = [7, 7]


def reset(replica: Replica, session: Follower) -> None:
    replica.reset("s")
    session.tokens = []


def checkpoint(replica: Replica, session: Follower) -> None:
    replica.checkpoint("s", "here")
    replica.wire.step("s", [8])
    replica.rollback("s", "here")


CALLS: dict[str, Callable[[Replica, Follower], None]] = {
    function.__name__: function for function in (step, sample, import_state, reset, checkpoint)
}


def test_calls_that_change_a_session_move_it(first: Replica, second: Replica) -> None:
    session = held(first, "SYNC")
    holder, other = first, second
    for call in CALLS.values():
        session.tokens = [1, 2, 3]
        holder.import_state("s", holder.quiet_state([1, 2, 3]))
        session.handle = holder.attach_by_id("s").handle
        holder.stream.account.losses.clear()
        call(other, session)
        loss = holder.stream.loss()
        assert (loss.handle, loss.reason) == (session.handle, "SESSION_MOVED")
        assert other.wire.state("s") == other.quiet_state(session.tokens)
        holder, other = other, holder
    holder.attach(session)
    assert other.close("s").position == session.position
    assert holder.stream.loss().reason == "SESSION_MOVED"
    for replica in (first, second):
        expect(of_call(partial(replica.get, "s")), "SESSION_CLOSED", field="session_id")


def test_a_server_that_drains_leaves_every_session_whole(start_replica: StartReplica, second: Replica) -> None:
    first = start_replica(checkpoint_interval_seconds=3600)
    sessions = [held_or_not(first, number) for number in range(40)]
    last = first.stream.run([session.handle for session in sessions], [[6] * 40] * len(sessions))
    first.server.terminate()
    answered = [first.stream.outcome(request) for request in last]
    for session, outcome in zip(sessions, answered, strict=True):
        if not hasattr(outcome, "reason"):
            session.consumed([6] * 40)
    assert first.stop() == 0
    for session in sessions:
        second.attach(session)
        session.step([7])
        second.check_exactly(session)


def held_or_not(replica: Replica, number: int) -> Follower:
    session = replica.session(f"s-{number}", "SYNC" if number % 2 else "PERIODIC")
    session.step([number % 11, 1])
    return session


def test_another_server_goes_on_where_a_killed_one_was(first: Replica, second: Replica) -> None:
    sessions = [held(first, durability, durability) for durability in ("PERIODIC", "SYNC")]
    sessions[1].step([4, 5, 6])
    first.kill()
    for session in sessions:
        second.attach(session)
        session.step([7])
        second.check_exactly(session)
    first.start()
    assert first.get("SYNC").position == 7
