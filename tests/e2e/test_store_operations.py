"""Operations on durable sessions: what was answered is so after a crash, and a repeat is answered as the first time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from google.protobuf.message import Message

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.stream_pb2 import Durability
from tests.support.refusals import expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.wire import Follower

pytestmark = pytest.mark.usefixtures("store_url")

DURABILITIES = pytest.mark.parametrize("durability", ["PERIODIC", "SYNC"])


def marks(session: pb.Session) -> list[tuple[str, int]]:
    return [(mark.name, mark.position) for mark in session.checkpoints]


@DURABILITIES
def test_what_an_operation_has_answered_is_so_after_a_crash(replica: Replica, durability: str) -> None:
    names = ["reset", "imported", "rolled", "forked", "closed"]
    sessions = {name: replica.session(name, durability) for name in names}
    for number, session in enumerate(sessions.values()):
        session.step([number, 1, 2])
    replica.checkpoint("rolled", "here")
    sessions["rolled"].step([9, 9])
    state = replica.wire.state("reset")
    epochs = {
        "reset": replica.reset("reset").epoch,
        "imported": replica.import_state("imported", state).epoch,
        "rolled": replica.rollback("rolled", "here").epoch,
        "copy": replica.fork("forked", "copy").epoch,
    }
    assert replica.close("closed").position == 3
    replica.crash()
    assert replica.get("reset").position == 0
    assert replica.wire.state("imported") == state
    assert replica.wire.state("rolled") == replica.quiet_state([2, 1, 2])
    assert replica.wire.state("copy") == replica.quiet_state([3, 1, 2])
    for name, epoch in epochs.items():
        told = replica.get(name)
        assert (told.epoch, Durability.Name(told.durability)) == (epoch, f"DURABILITY_{durability}")
    expect(of_call(lambda: replica.get("closed")), "SESSION_CLOSED", field="session_id")
    # They go on from there.
    sessions["reset"].restart(0)
    sessions["imported"].tokens = [0, 1, 2]
    sessions["rolled"].tokens = [2, 1, 2]
    for name in ("reset", "imported", "rolled"):
        opened = replica.attach(sessions[name])
        assert opened.epoch > epochs[name]
        sessions[name].step([5, 6])
        replica.check_exactly(sessions[name])


# Each on a session of its own.
CALLS: dict[str, Callable[[Replica, str], Message]] = {
    "reset": lambda replica, key: replica.reset("reset", request_id=key),
    "import": lambda replica, key: replica.import_state("import", replica.wire.state("other"), request_id=key),
    "checkpoint": lambda replica, key: replica.checkpoint("checkpoint", "named", request_id=key),
    "rollback": lambda replica, key: replica.rollback("rollback", "marked", request_id=key),
    "fork": lambda replica, key: replica.fork("fork", "copy", request_id=key),
    "fork-unnamed": lambda replica, key: replica.fork("fork-unnamed", request_id=key),
    "close": lambda replica, key: replica.close("close", request_id=key),
    "create": lambda replica, key: replica.wire.open(MODEL, ["new", "newer"], "CREATE", request_id=key),
    "open": lambda replica, key: replica.wire.open(MODEL, ["newest"], request_id=key),
    "open-unnamed": lambda replica, key: replica.wire.open(MODEL, 5, request_id=key),
}


@pytest.mark.parametrize("used", [False, True], ids=["at once", "when the sessions have gone on"])
def test_a_call_repeated_after_a_crash_is_answered_as_the_first_time(replica: Replica, *, used: bool) -> None:
    for session_id in (*CALLS, "other"):
        replica.session(session_id).step([1, 2, 3])
    replica.checkpoint("rollback", "marked")
    replica.wire.step("rollback", [4])
    first: dict[str, Any] = {name: call(replica, f"key-{name}") for name, call in CALLS.items()}
    replica.crash()
    ids = [session.id for session in listed(replica)]
    if used:
        for session_id in ids:
            replica.wire.step(session_id, [5, 6])
    states = {session_id: replica.wire.state(session_id) for session_id in ids}
    for name, call in CALLS.items():
        assert call(replica, f"key-{name}") == first[name]
    assert {session.id: replica.wire.state(session.id) for session in listed(replica)} == states


def listed(replica: Replica) -> Sequence[pb.Session]:
    return replica.wire.sessions.ListSessions(pb.ListSessionsRequest()).sessions


def test_a_session_keeps_its_newest_marks_over_a_crash(start_replica: StartReplica) -> None:
    replica = start_replica(max_checkpoints=3)
    session = replica.session("marked")
    for number, name in enumerate(["a", "b", "c", "b", "d"], 1):
        session.step([number])
        assert replica.checkpoint("marked", name).position == number
    kept = [("c", 3), ("b", 4), ("d", 5)]
    assert marks(replica.get("marked")) == kept
    replica.crash()
    assert marks(replica.get("marked")) == kept
    for name in ("a", "never"):
        expect(of_call(partial(replica.rollback, "marked", name)), "CHECKPOINT_NOT_FOUND", field="name")
    for name, position in [("b", 4), ("c", 3), ("d", 5), ("c", 3)]:
        assert replica.rollback("marked", name).position == position
        session.tokens = list(range(1, position + 1))
        replica.attach(session)
        replica.check_exactly(session)
        session.step([9, 9])
    assert marks(replica.get("marked")) == kept


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 129])
def test_a_mark_has_a_name_like_a_session(replica: Replica, name: str) -> None:
    replica.session("s").step([1])
    expect(of_call(lambda: replica.checkpoint("s", name)), "INVALID_INPUT", field="name")
    expect(of_call(lambda: replica.rollback("s", name)), "INVALID_INPUT", field="name")


def test_marks_are_let_go_by_no_reset_and_kept_by_no_copy(replica: Replica) -> None:
    session = replica.session("s")
    session.step([1, 2])
    replica.checkpoint("s", "two")
    replica.reset("s")
    assert marks(replica.get("s")) == [("two", 2)]
    replica.fork("s", "copy")
    assert marks(replica.get("copy")) == []
    assert replica.rollback("s", "two").position == 2
    replica.attach(session)
    session.step([3])
    replica.check_exactly(session)


def refuse_open(replica: Replica, session_id: str, reason: str, mode: str = "ATTACH", model: str = MODEL) -> None:
    """Neither a stream nor a call opens it."""
    command, [request] = replica.stream.opening(model, [session_id], mode)
    replica.stream.send(command)
    expect(replica.stream.refusal(request), reason)
    expect(of_call(lambda: replica.wire.open(model, [session_id], mode)), reason)


def test_how_a_session_ended_is_known_after_a_crash(start_replica: StartReplica) -> None:
    replica = start_replica(idle_timeout_seconds=0.5, ended_session_memory_seconds=3)
    for session_id in ("closed", "expires here", "expires later"):
        replica.session(session_id.replace(" ", "-")).step([1, 2])
    replica.close("closed")
    while of_call_or_none(lambda: replica.get("expires-here")) is None:
        replica.wire.step("expires-later", [1])
    replica.crash()
    refuse_open(replica, "closed", "SESSION_CLOSED")
    refuse_open(replica, "expires-here", "SESSION_EXPIRED")
    while of_call_or_none(lambda: replica.get("expires-later")) is None:
        pass
    refuse_open(replica, "expires-later", "SESSION_EXPIRED")
    # Their ids are free.
    for session_id in ("closed", "expires-here", "expires-later"):
        Follower(replica.wire, replica.stream, session_id=session_id, mode="CREATE").step([5])


def of_call_or_none(call: Callable[[], object]) -> str | None:
    """Why a call is refused, if it is."""
    try:
        return of_call(call).reason
    except AssertionError:
        return None


def test_a_stored_session_exists(replica: Replica) -> None:
    replica.session("stored").step([1])
    replica.crash()
    refuse_open(replica, "stored", "SESSION_EXISTS", "CREATE")
    for mode in ("ATTACH", "ATTACH_OR_CREATE", "CREATE"):
        refuse_open(replica, "stored", "SESSION_EXISTS", mode, "tiny-lstm")
    replica.session("source").step([2])
    expect(of_call(lambda: replica.fork("source", "stored")), "SESSION_EXISTS", field="fork_session_id")
    state = replica.wire.state("source").SerializeToString()
    expect(of_call(lambda: replica.wire.open(MODEL, ["stored"], states=[state])), "SESSION_EXISTS")
    # One of many that cannot be created is none of many.
    expect(of_call(lambda: replica.wire.open(MODEL, ["new", "stored"], "CREATE")), "SESSION_EXISTS")
    expect(of_call(lambda: replica.get("new")), "SESSION_NOT_FOUND")
    assert replica.wire.state("stored") == replica.quiet_state([1])


def test_stored_sessions_are_listed_with_those_that_are_not(replica: Replica) -> None:
    for number in range(7):
        replica.session(f"s-{number}").step([number, 1])
    replica.checkpoint("s-3", "mark")
    replica.crash()
    for number in range(2, 9, 2):
        replica.session(f"s-{number}-none", "NONE").step([1])
    opened = replica.attach_by_id("s-5")
    session = replica.get("s-3")
    assert (session.position, session.durable_position, session.tier) == (2, 2, pb.Tier.TIER_STORE)
    assert (session.model, session.model_version, session.attached, session.num_pending_tokens) == (MODEL, 1, False, 0)
    assert marks(session) == [("mark", 2)]
    assert 0 < session.idle_seconds < session.age_seconds < 30
    assert replica.get("s-5").tier != pb.Tier.TIER_STORE
    assert replica.get("s-5").attached
    assert replica.get("s-5").epoch == opened.epoch
    found: list[pb.Session] = []
    token = ""
    while not found or token:
        page = replica.wire.sessions.ListSessions(pb.ListSessionsRequest(page_size=3, page_token=token))
        assert page.total_size == 11
        assert len(page.sessions) <= 3
        found += page.sessions
        token = page.next_page_token
    ids = [one.id for one in found]
    assert ids == sorted([f"s-{number}" for number in range(7)] + [f"s-{number}-none" for number in range(2, 9, 2)])
    assert marks(found[ids.index("s-3")]) == [("mark", 2)]
    for one in found:
        assert (one.durability == Durability.DURABILITY_NONE) == one.id.endswith("none")
    assert replica.wire.sessions.ListSessions(pb.ListSessionsRequest(model="tiny-lstm")).total_size == 0
