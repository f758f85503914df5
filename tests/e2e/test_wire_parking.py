"""More sessions than slots: the longest idle ones park, and nobody meets another's state."""

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.metrics import Metrics
from tests.support.server import ServerProcess
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower, Wire

NUM_SLOTS = 3


@pytest.fixture
def server(small_server: ServerProcess) -> ServerProcess:
    return small_server


@pytest.mark.parametrize("model", ["tiny-gru", "tiny-lstm"])
def test_twelve_sessions_share_three_slots(wire: Wire, stream: RawStream, model: str) -> None:
    before = Metrics.of(wire.server)
    random = np.random.default_rng(3)
    sessions = [Follower(wire, stream, model) for _ in range(12)]
    for _ in range(25):
        chosen = [sessions[place] for place in random.permutation(12)[: random.integers(1, 13)]]
        runs = [random.integers(0, 11, random.integers(1, 20)).tolist() for _ in chosen]
        requests = stream.run([session.handle for session in chosen], runs, outputs(states=True))
        for session, run, request in zip(chosen, runs, requests, strict=True):
            session.take(run, request)
    listed = wire.sessions.ListSessions(pb.ListSessionsRequest(model=model)).sessions
    tiers = [session.tier for session in listed]
    assert (tiers.count(pb.Tier.TIER_DEVICE), tiers.count(pb.Tier.TIER_HOST)) == (NUM_SLOTS, 12 - NUM_SLOTS)
    for session in sessions:
        session.check()  # wherever it is
    after = Metrics.of(wire.server)
    assert after.value("cellserve_sessions", model=model, tier="device") == NUM_SLOTS
    assert after.value("cellserve_sessions", model=model, tier="host") == 12 - NUM_SLOTS
    parked = after.since(before, "cellserve_parked_total", model=model)
    unparked = after.since(before, "cellserve_unparked_total", model=model)
    # Whoever has parked once and is not on the device now has come back each time but the last.
    assert parked - unparked == 12 - NUM_SLOTS
    assert unparked > 25


def test_all_sessions_run_at_once_on_fewer_slots(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(12)]
    for _ in range(5):
        requests = []
        for place, session in enumerate(sessions):
            positions = [session.position, session.position + 8]
            requests.append(
                stream.run([session.handle] * 2, [[place % 11] * 8, [1]], outputs(states=True), positions=positions)
            )
        for place, (session, (first, second)) in enumerate(zip(sessions, requests, strict=True)):
            session.take([place % 11] * 8, first)
            session.take([1], second)


def test_the_longest_idle_session_parks(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(NUM_SLOTS)]
    for session in sessions:
        session.step([1])
    sessions[0].step([2])  # so that the second is the longest idle one
    newcomer = Follower(wire, stream)
    newcomer.step([3])
    tiers = {one.id: one.tier for one in wire.sessions.ListSessions(pb.ListSessionsRequest()).sessions}
    expected = [pb.Tier.TIER_DEVICE, pb.Tier.TIER_HOST, pb.Tier.TIER_DEVICE, pb.Tier.TIER_DEVICE]
    assert [tiers[session.id] for session in (*sessions, newcomer)] == expected
    sessions[1].step([4])


def test_a_slot_that_was_closed_begins_from_zero(wire: Wire, stream: RawStream) -> None:
    for number in range(12):
        session = Follower(wire, stream, "tiny-lstm")
        session.step([number % 11] * 5)
        if number % 2:
            stream.done(stream.close_session(session.handle))
        else:
            wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session.id))


def test_a_reset_session_begins_from_zero_on_the_device_and_parked(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(6)]
    for session in sessions:
        session.step([7, 8, 9])
    for session in sessions:
        session.restart(stream.done(stream.reset(session.handle)).handle)
        session.check()
        session.step([1])


def test_a_parked_session_is_forked_and_imported_whole(wire: Wire, stream: RawStream) -> None:
    sessions = [Follower(wire, stream) for _ in range(6)]
    for place, session in enumerate(sessions):
        session.step([place, place + 1])
    forks = []
    for session in sessions:
        forked = wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id))
        fork = Follower(wire, stream, session_id=forked.session_id, mode="ATTACH")
        fork.consumed(session.tokens)
        forks.append(fork)
    for place, session in enumerate([*sessions, *forks]):
        session.step([place % 11])
        session.check()
