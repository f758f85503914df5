"""A store that does not answer for a while: who needs it is told so, who does not goes on, and it heals by itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import Generated, generate, request_of
from tests.support.metrics import Metrics
from tests.support.redis_server import RedisServer
from tests.support.refusals import Refused, expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import outputs
from tests.support.troubles import (
    database_locked,
    disk_full,
    disk_of,
    files_limited,
    redis_killed,
    redis_paused,
)
from tests.support.wire import Follower

Trouble = Callable[[Replica], AbstractContextManager[None]]

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
TROUBLES = ["redis killed", "redis paused", "database locked", "files limited", "disk full"]


@pytest.fixture(scope="module")
def durable_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that loses nothing."""
    with RedisServer(tmp_path_factory.mktemp("durable-redis"), DURABLE) as server:
        yield server


@pytest.fixture(params=TROUBLES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Trouble]]:
    """URL of a store, and what befalls it."""
    kind: str = request.param
    with ExitStack() as stack:
        if kind.startswith("redis"):
            redis: RedisServer = request.getfixturevalue("durable_redis")
            with Redis.from_url(redis.url) as client:
                client.flushall()
            befalls = redis_killed if kind == "redis killed" else redis_paused
            yield redis.url, lambda _: befalls(redis)
            return
        folder = stack.enter_context(disk_of(tmp_path / "disk", 1 << 20)) if kind == "disk full" else tmp_path
        path = folder / "cells.db"
        yield (
            f"sqlite:///{path}",
            lambda replica: {
                "database locked": lambda: database_locked(path),
                "files limited": lambda: files_limited(replica.server),
                "disk full": lambda: disk_full(folder),
            }[kind](),
        )


def refuse_opens(replica: Replica) -> None:
    """What must be looked up in the store, or be written there, is refused."""
    stream = replica.stream
    for session_id, mode, holders in [
        ("new", "CREATE", []),
        ("new", "ATTACH_OR_CREATE", []),
        ("stored", "ATTACH", []),
        ("stored", "RESUME", [5]),
        ("periodic", "ATTACH", []),
    ]:
        command, [request] = stream.opening(MODEL, [session_id], mode, holders=holders)
        stream.send(command)
        expect(stream.refusal(request), "STORE_UNAVAILABLE")
    calls: list[Callable[[], object]] = [
        partial(replica.wire.open, MODEL, 3),
        partial(replica.wire.open, MODEL, ["new"], durability="SYNC"),
        partial(replica.get, "stored"),
        partial(replica.wire.step, "stored", [1]),
        partial(replica.wire.state, "stored"),
        partial(replica.close, "stored"),
        partial(replica.wire.sessions.ListSessions, pb.ListSessionsRequest()),
    ]
    for call in calls:
        expect(of_call(call), "STORE_UNAVAILABLE")


def refuse_changes(replica: Replica, session: Follower) -> None:
    """Changes that are written through are refused, and change nothing."""
    state = replica.wire.state("periodic")
    calls: list[Callable[[], object]] = [
        partial(replica.reset, "periodic"),
        partial(replica.import_state, "periodic", state),
        partial(replica.fork, "periodic", "new"),
        partial(replica.checkpoint, "periodic", "new"),
        partial(replica.close, "periodic"),
        partial(replica.close, "sync"),
    ]
    for call in calls:
        expect(of_call(call), "STORE_UNAVAILABLE")
    stream = replica.stream
    expect(stream.refusal(stream.reset(session.handle)), "STORE_UNAVAILABLE")
    expect(stream.refusal(stream.close_session(session.handle)), "STORE_UNAVAILABLE")
    sampling = pb.GenerateRequest(session_id="sync", max_tokens=3)
    expect(of_call(partial(replica.wire.sessions.Generate, sampling)), "STORE_UNAVAILABLE")
    assert replica.wire.state("periodic") == state


def test_while_the_store_does_not_answer(start_replica: StartReplica, store: tuple[str, Trouble]) -> None:
    url, befalls = store
    replica = start_replica(store=url)
    stream = replica.stream
    sessions = {name: replica.session(name.lower(), name) for name in ("NONE", "PERIODIC", "SYNC")}
    sessions["stored"] = replica.session("stored")
    for session in sessions.values():
        session.step([1, 2, 3])
    stream.done(stream.detach(sessions["stored"].handle))
    none, periodic, sync = (sessions[name] for name in ("NONE", "PERIODIC", "SYNC"))
    stream.durable(periodic.handle, 3)
    assert Metrics.of(replica.server).value("cellserve_store_errors_total") == 0
    wanted = outputs(states=True)
    with befalls(replica):
        in_doubt = stream.run([sync.handle], [[4, 5]], wanted, positions=[3])[0]
        metrics = Metrics.wait(replica.server, lambda found: found.value("cellserve_store_errors_total") > 0)
        assert metrics.value("cellserve_checkpoint_lag_seconds") > 0
        for token in range(5):
            none.step([token])
            periodic.step([token])
        refuse_opens(replica)
        refuse_changes(replica, periodic)
        expect(stream.refuse(sync.handle, [6], position=5), "STORE_UNAVAILABLE")
        others = [replica.session("other", "NONE"), Follower(replica.wire, stream, durability="NONE")]
        for session in (*others, none, periodic):
            session.step([7, 8])
        assert not stream.is_answered(in_doubt)
        assert stream.account.durable_positions[periodic.handle] == 3
        assert stream.account.durable_positions[sync.handle] <= 3
    sync.take([4, 5], in_doubt)
    stream.durable(periodic.handle, periodic.position)
    while of_refused(replica, sync):
        pass
    Metrics.wait(replica.server, lambda found: found.value("cellserve_checkpoint_lag_seconds") < 0.5)
    replica.checkpoint("periodic", "healed")
    for session in (none, periodic, sync):
        session.step([9])
        replica.check_exactly(session)
    stream.durable(periodic.handle, periodic.position)
    assert replica.server.log.count("store_available") == 1
    replica.crash()
    for session in (periodic, sync, sessions["stored"]):
        replica.attach(session)
        session.step([1])
        replica.check_exactly(session)


def of_refused(replica: Replica, session: Follower) -> bool:
    """Send a run of one token; whether the store is still said not to answer."""
    outcome = replica.stream.outcome(replica.stream.run([session.handle], [[6]], positions=[session.position])[0])
    if isinstance(outcome, Refused):
        expect(outcome, "STORE_UNAVAILABLE")
        return True
    session.consumed([6])
    return False


def test_a_generate_rests_while_its_tokens_cannot_leave(start_replica: StartReplica, redis_server: RedisServer) -> None:
    replica = start_replica(store=redis_server.url)
    session, quiet = replica.session(durability="SYNC"), replica.session(durability="NONE")
    settings = {"max_tokens": 5000, "seed": 3}
    call = replica.wire.sessions.Generate(request_of(session, **settings), timeout=60)
    heard = Generated()
    heard.take(next(call))
    with redis_killed(redis_server):
        Metrics.wait(replica.server, lambda found: found.value("cellserve_store_errors_total") > 0)
        # The session is here, and told of here, wherever it stands.
        position = replica.get(session.id).position
        expected = generate(quiet, **settings)
        assert replica.get(session.id).position == position < 5000
        other = replica.wire.open(MODEL, ["none"], durability="NONE")
        assert other.created == [True]
    for message in call:
        heard.take(message)
    assert heard.tokens == expected.tokens
    assert replica.wire.state(session.id) == replica.wire.state(quiet.id)


def test_a_slow_store_holds_up_only_who_waits_for_it(start_replica: StartReplica, durable_redis: RedisServer) -> None:
    replica = start_replica(store=durable_redis.url)
    sync, none = replica.session(), replica.session(durability="NONE")
    for session in (sync, none):
        session.step([1])
    durable_redis.pause()
    request = replica.stream.run([sync.handle], [[2, 3]], outputs(states=True), positions=[1])[0]
    begun_at, slowest = time.monotonic(), 0.0
    while time.monotonic() < begun_at + 1.0:
        step_at = time.monotonic()
        replica.wire.step(none.id, [4])
        slowest = max(slowest, time.monotonic() - step_at)
    assert not replica.stream.is_answered(request)
    durable_redis.resume()
    sync.take([2, 3], request)
    assert slowest < 0.5
    assert Metrics.of(replica.server).value("cellserve_store_errors_total") == 0
