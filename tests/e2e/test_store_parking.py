"""Idle sessions leave the device and the server's memory, and come back from the store with their next run."""

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.metrics import Metrics
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import outputs
from tests.support.wire import Follower

pytestmark = pytest.mark.usefixtures("store_url")

NUM_SESSIONS = 50
NUM_SLOTS = 2


@pytest.fixture
def replica(start_replica: StartReplica) -> Replica:
    """A server that keeps no more states than it has slots."""
    return start_replica(max_slots=NUM_SLOTS, max_parked_states=0, idle_timeout_seconds=3)


def wait_until_stored(replica: Replica, number: int) -> None:
    """Until the states of so many sessions are in the store alone."""
    request = pb.ListSessionsRequest(page_size=1000)
    while [one.tier for one in replica.wire.sessions.ListSessions(request).sessions].count(pb.Tier.TIER_STORE) < number:
        pass


def step_all(replica: Replica, sessions: list[Follower], random: np.random.Generator) -> None:
    order = [sessions[place] for place in random.permutation(len(sessions))]
    runs = [random.integers(0, 11, random.integers(1, 6)).tolist() for _ in order]
    requests = replica.stream.run([session.handle for session in order], runs, outputs(states=True))
    for session, run, request in zip(order, runs, requests, strict=True):
        session.take(run, request)


def test_many_sessions_take_turns_on_few_slots(replica: Replica) -> None:
    random = np.random.default_rng(7)
    sessions = [replica.session(f"s-{number}", "SYNC" if number % 2 else "PERIODIC") for number in range(NUM_SESSIONS)]
    for _ in range(3):
        step_all(replica, sessions, random)
        wait_until_stored(replica, NUM_SESSIONS - NUM_SLOTS)
        # Who looks at a stored session is told what it is.
        sessions[0].check()
    step_all(replica, sessions, random)
    metrics = Metrics.of(replica.server)
    assert metrics.value("cellserve_fetched_total", model=MODEL) >= 3 * (NUM_SESSIONS - NUM_SLOTS)
    parked, unparked = (metrics.value(f"cellserve_{name}_total", model=MODEL) for name in ("parked", "unparked"))
    assert unparked >= 3 * (NUM_SESSIONS - NUM_SLOTS)
    assert parked - unparked == NUM_SESSIONS - NUM_SLOTS
    for session in sessions:
        session.check()
    replica.crash()
    for session in sessions[:4]:
        replica.attach(session)
        session.step([1, 2])
        replica.check_exactly(session)


def test_operations_reach_a_session_that_is_in_the_store_alone(replica: Replica) -> None:
    names = ["reset", "imported", "marked", "forked", "closed", "detached", "busy", "busier"]
    sessions = {name: replica.session(name) for name in names}
    for number, session in enumerate(sessions.values()):
        session.step([number, 1, 2])
    wait_until_stored(replica, len(names) - NUM_SLOTS)
    state = replica.wire.state("forked")
    stream = replica.stream
    stream.done(stream.reset(sessions["reset"].handle))
    replica.import_state("imported", state)
    replica.checkpoint("marked", "here")
    replica.fork("forked", "copy")
    stream.done(stream.close_session(sessions["closed"].handle))
    stream.done(stream.detach(sessions["detached"].handle))
    replica.crash()
    assert replica.get("reset").position == 0
    for name in ("imported", "forked", "copy"):
        assert replica.wire.state(name) == state
    assert [mark.name for mark in replica.get("marked").checkpoints] == ["here"]
    replica.attach(sessions["detached"])
    sessions["detached"].step([7])
    replica.check_exactly(sessions["detached"])


def test_attaching_puts_the_end_of_a_session_off_wherever_it_is(replica: Replica) -> None:
    sessions = [replica.session(f"visited-{number}") for number in range(NUM_SLOTS + 1)]
    for session in sessions:
        session.step([1])
    wait_until_stored(replica, 1)
    while replica.get("visited-0").idle_seconds < 1.7:
        pass
    for session in sessions:
        replica.attach(session)
    while replica.get("visited-0").idle_seconds < 1.5:
        pass
    replica.crash()
    for session in sessions:
        replica.attach(session)
        session.step([2])
        replica.check_exactly(session)
