"""Resuming: a client that lost its stream gets its session back unless somebody else came between; and detaching."""

from typing import Any

import grpc
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.refusals import Refused, expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import RawStream, outputs
from tests.support.wire import Follower

pytestmark = pytest.mark.usefixtures("store_url")

MARK = 2**64 - 17  # all bits count
ANOTHER = 2**63 + 5


@pytest.fixture
def session(replica: Replica) -> Follower:
    """A session held under MARK."""
    session = replica.session("s", "PERIODIC", holders=[MARK])
    session.step([1, 2, 3])
    return session


def resume(replica: Replica, session: Follower, mark: int = MARK) -> None:
    """Resume it on a new stream, which must succeed, and go on."""
    replica.stream = replica.wire.stream()
    replica.attach(session, "RESUME", holders=[mark])
    session.step([4])


def refuse_resume(replica: Replica, session_id: str = "s", reason: str = "SESSION_MOVED", **more: Any) -> Refused:
    command, [request] = replica.stream.opening(MODEL, [session_id], "RESUME", **more)
    replica.stream.send(command)
    refused = replica.stream.refusal(request)
    expect(refused, reason)
    return refused


def test_the_holder_resumes_as_often_as_it_likes(replica: Replica, session: Follower) -> None:
    epochs = [replica.get("s").epoch]
    for _ in range(3):
        resume(replica, session)
        epochs.append(replica.get("s").epoch)
    assert epochs == sorted(set(epochs))
    replica.check_exactly(session)


def test_another_mark_resumes_nothing(replica: Replica, session: Follower) -> None:
    replica.stream.durable(session.handle, 3)
    for _ in ("here", "after a crash"):
        with session.wire.unmoved("s"):
            for mark in (ANOTHER, 0, MARK & 2**63 - 1, MARK + 1):
                refuse_resume(replica, holders=[mark])
        replica.crash()
        session.wire = replica.wire
    resume(replica, session)


@pytest.mark.parametrize("taker", [ANOTHER, 0, None], ids=["another mark", "mark 0", "no mark"])
def test_after_another_attach_the_session_has_moved(replica: Replica, session: Follower, taker: int | None) -> None:
    replica.stream = replica.wire.stream()
    replica.attach(session, holders=[] if taker is None else [taker])
    session.step([9])
    replica.stream.durable(session.handle, 4)
    for _ in ("here", "after a crash"):
        refuse_resume(replica, holders=[MARK])
        refuse_resume(replica, holders=[0])
        replica.crash()
    if taker:
        resume(replica, session, taker)


def by_somebody(replica: Replica, operation: str, holder: int) -> None:
    """An operation, asked by the holder of that mark, on the session that is called after it."""
    state = replica.wire.state(operation)
    replica.checkpoint(operation, "here")  # which changes no state, and takes no mark away
    match operation:
        case "reset":
            replica.reset(operation, holder=holder)
        case "import":
            replica.import_state(operation, state, holder=holder)
        case "rollback":
            replica.rollback(operation, "here", holder=holder)
        case "open":
            replica.wire.open(MODEL, [operation])


@pytest.mark.parametrize("keeps", [False, True], ids=["by somebody else", "by the holder"])
def test_only_the_holders_own_operations_leave_it_its_mark(replica: Replica, *, keeps: bool) -> None:
    operations = ["reset", "import", "rollback"] if keeps else ["reset", "import", "rollback", "open"]
    sessions = [replica.session(operation, holders=[MARK]) for operation in operations]
    for session in sessions:
        session.step([1, 2, 3])
        by_somebody(replica, session.id, MARK if keeps else 0)
        assert replica.stream.loss().reason == ("SESSION_MOVED" if session.id == "open" else "STALE_HANDLE")
    sessions[0].restart(0)
    for _ in ("here", "after a crash"):
        for session in sessions:
            if keeps:
                resume(replica, session)
                replica.stream.durable(session.handle, session.position)
            else:
                refuse_resume(replica, session.id, holders=[MARK])
                refuse_resume(replica, session.id, holders=[0])
        replica.crash()
    for session in sessions:
        replica.attach(session)
        replica.check_exactly(session)


def test_resuming_needs_a_stream_and_a_mark(replica: Replica, session: Follower) -> None:
    expect(of_call(lambda: replica.wire.open(MODEL, ["s"], "RESUME")), "INVALID_INPUT", field="mode")
    refuse_resume(replica, reason="INVALID_INPUT")
    session.step([1])  # which has lost nothing


def test_what_is_not_there_is_not_resumed(replica: Replica, session: Follower) -> None:
    refuse_resume(replica, "never", "SESSION_NOT_FOUND", holders=[MARK])
    replica.close("s")
    refuse_resume(replica, "s", "SESSION_CLOSED", holders=[MARK])
    replica.crash()
    refuse_resume(replica, "s", "SESSION_CLOSED", holders=[MARK])


@pytest.mark.parametrize("durability", ["NONE", "PERIODIC", "SYNC"])
def test_a_detached_session_is_nobodys_and_goes_on_elsewhere(
    replica: Replica, start_replica: StartReplica, durability: str
) -> None:
    session = replica.session("s", durability)
    stream, before = session.stream, session.handle
    epoch = replica.get("s").epoch
    session.step([1, 2, 3])
    positions = [3, 4099]
    runs = [[5] * 4096, [6]]
    requests = stream.run([before] * 2, runs, outputs("last", states=True), positions=positions)
    done = stream.done(stream.detach(before))
    assert (done.handle, done.epoch) == (0, epoch + 1)
    # What was accepted has run.
    assert [stream.answer(request).position for request in requests] == [4099, 4100]
    for run in runs:
        session.consumed(run)
    assert stream.refuse(before, [1]).reason == "STALE_HANDLE"
    assert not stream.lost_handles
    assert not replica.get("s").attached
    elsewhere = replica if durability == "NONE" else start_replica()
    elsewhere.attach(session)
    assert replica.wire.state("s") == elsewhere.quiet_state(session.tokens)


def test_a_stream_that_was_cut_leaves_its_sessions_durable(replica: Replica, session: Follower) -> None:
    session.stream.cut()
    with pytest.raises((EOFError, grpc.RpcError)):
        session.stream.read()
    replica.stream = replica.wire.stream()
    while replica.get("s").durable_position != 3:
        pass
    replica.crash()
    resume(replica, session)
    replica.check_exactly(session)


def test_detaching_again_or_what_is_busy_is_refused(replica: Replica) -> None:
    session = replica.session("s")
    session.step([1])
    call = replica.wire.sessions.Generate(pb.GenerateRequest(session_id="s", max_tokens=100_000), timeout=30)
    next(call)
    expect(replica.stream.refusal(replica.stream.detach(session.handle)), "SESSION_BUSY")
    call.cancel()
    while of_busy(replica.stream, session.handle):
        pass
    expect(replica.stream.refusal(replica.stream.detach(session.handle)), "STALE_HANDLE")


def of_busy(stream: RawStream, handle: int) -> bool:
    """Detach; whether a generate is under way still."""
    outcome = stream.outcome(stream.detach(handle))
    if isinstance(outcome, Refused):
        expect(outcome, "SESSION_BUSY")
        return True
    return False
