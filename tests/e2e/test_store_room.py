"""A full server with a state store: what nobody holds gives its place, and with `evict_when_full` what is idle."""

import numpy as np
import pytest

from cellserve import Client
from cellserve.errors import SessionEvicted, SessionLimit
from tests.support.metrics import Metrics
from tests.support.replicas import MODEL, StartReplica

pytestmark = pytest.mark.usefixtures("store_url")

LIMIT = 4


def test_sessions_that_nobody_holds_are_left_to_the_store_for_those_that_come(start_replica: StartReplica) -> None:
    replica = start_replica(max_sessions=LIMIT, max_slots=2, max_parked_states=1)
    other = start_replica(store="")
    with Client(replica.server.target) as client:
        tokens = {}
        for number in range(3 * LIMIT):
            with client.session(MODEL, id=f"s-{number}", durability="sync") as session:
                tokens[session.id] = [number % 11, 3, 1]
                session.step(tokens[session.id])
        for number in range(LIMIT):
            session = client.open_session(MODEL, id=f"s-{number}", durability="sync")
            tokens[session.id] += [2]
            assert session.step([2]).position == 4
        for session_id, run in tokens.items():
            state = replica.wire.state(session_id)
            with Client(other.server.target) as quiet, quiet.session(MODEL) as copy:
                copy.step(run)
                assert copy.export_state() == state.SerializeToString()
        # Four are held now, and stay.
        with pytest.raises(SessionLimit):
            client.open_session(MODEL, id="one-more", durability="sync", timeout_seconds=2.0)


def test_a_client_goes_on_with_more_sessions_than_a_server_that_evicts_can_hold(start_replica: StartReplica) -> None:
    replica = start_replica(max_sessions=LIMIT, max_slots=2, evict_when_full=True, checkpoint_interval_seconds=0.1)
    random = np.random.default_rng(3)
    with Client(replica.server.target) as client:
        sessions = [
            client.open_session(MODEL, id=f"s-{number}", durability="sync" if number % 2 else "periodic")
            for number in range(2 * LIMIT)
        ]
        tokens: dict[str, list[int]] = {session.id: [] for session in sessions}
        for _ in range(4):
            for session in sessions:
                run = random.integers(0, 11, 3).tolist()
                assert session.step(run).position == len(tokens[session.id]) + 3
                tokens[session.id] += run
        for session in sessions:
            assert session.position == len(tokens[session.id]) == 12
            exported = session.export_state()
            session.close()
            assert exported == replica.quiet_state(tokens[session.id]).SerializeToString()
    assert "SESSION_EVICTED" not in replica.server.metrics()


def test_only_sessions_that_no_store_has_are_lost_when_they_are_evicted(start_replica: StartReplica) -> None:
    replica = start_replica(max_sessions=LIMIT, evict_when_full=True, checkpoint_interval_seconds=0.1)
    with Client(replica.server.target) as client:
        plain = [client.open_session(MODEL, id=f"n-{number}", durability="none") for number in range(LIMIT)]
        plain[0].step([1])
        client.open_session(MODEL, id="newer", durability="none")
        with pytest.raises(SessionEvicted):
            plain[1].step([1])
        with pytest.raises(SessionEvicted):
            client.open_session(MODEL, id="n-1", mode="attach")
        plain[0].step([1])
    assert Metrics.of(replica.server).value("cellserve_sessions_closed_total", reason="SESSION_EVICTED") == 1
