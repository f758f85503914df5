"""Opening sessions: modes, ids, columns, and what Get and List tell of them."""

from functools import partial

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.stream_pb2 import Command, Durability, OpenCommand
from tests.support.refusals import expect, of_call
from tests.support.stream import RawStream
from tests.support.wire import Follower, Wire

pytestmark = pytest.mark.usefixtures("witnesses")


def total_size(wire: Wire) -> int:
    return wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size


@pytest.mark.parametrize("mode", ["UNSPECIFIED", "ATTACH_OR_CREATE", "CREATE"])
def test_ids_that_are_new_are_created(wire: Wire, stream: RawStream, mode: str) -> None:
    opened = stream.open_many("tiny-gru", ["x:1", "A-b_c.9", "z" * 128], mode)
    assert [one.session_id for one in opened] == ["x:1", "A-b_c.9", "z" * 128]
    assert all((one.created, one.position, one.epoch) == (True, 0, 1) for one in opened)
    assert len({one.handle for one in opened}) == 3
    created = wire.open("tiny-gru", ["x:2", "x:3"], mode)
    assert (list(created.created), list(created.epochs)) == ([True, True], [1, 1])


@pytest.mark.parametrize("mode", ["UNSPECIFIED", "ATTACH_OR_CREATE", "CREATE"])
def test_the_server_makes_ids_that_are_all_different(wire: Wire, stream: RawStream, mode: str) -> None:
    opened = stream.open_many("tiny-gru", 50, mode)
    ids = [one.session_id for one in opened] + list(wire.open("tiny-gru", 50, mode).session_ids)
    assert len(set(ids)) == 100
    assert all(0 < len(session_id) <= 128 for session_id in ids)


def test_creating_an_id_that_exists_is_refused(wire: Wire, session: Follower) -> None:
    command, requests = session.stream.opening("tiny-gru", ["new-one", session.id], "CREATE")
    session.stream.send(command)
    assert session.stream.opened(requests[0]).created
    expect(session.stream.refusal(requests[1]), "SESSION_EXISTS")
    refused = of_call(lambda: wire.open("tiny-gru", ["another", session.id], "CREATE"))
    expect(refused, "SESSION_EXISTS", field="session_ids")
    # All or none by a unary call.
    refused = of_call(lambda: wire.sessions.GetSession(pb.GetSessionRequest(session_id="another")))
    expect(refused, "SESSION_NOT_FOUND", field="session_id")


def test_one_command_opens_and_another_runs_in_the_same_frame(wire: Wire, session: Follower) -> None:
    stream = session.stream
    opening, [opened] = stream.opening("tiny-lstm")
    running, [run] = stream.running([session.handle], [[5]])
    stream.send(opening, running)
    assert stream.opened(opened).created
    assert stream.answer(run).position == 4
    session.consumed([5])


@pytest.mark.parametrize("session_id", ["", " ", "a b", "a/b", "ä", "a" * 129, "a\n", "\0"])
def test_ids_outside_the_alphabet_are_refused(wire: Wire, session: Follower, session_id: str) -> None:
    command, requests = session.stream.opening("tiny-gru", [session_id, "good"])
    session.stream.send(command)
    expect(session.stream.refusal(requests[0]), "INVALID_INPUT")
    assert session.stream.opened(requests[1]).created
    expect(of_call(lambda: wire.open("tiny-gru", [session_id])), "INVALID_INPUT", field="session_ids")


def test_an_id_that_stands_twice_is_refused(wire: Wire, stream: RawStream) -> None:
    command, requests = stream.opening("tiny-gru", ["twin", "twin"])
    stream.send(command)
    assert stream.opened(requests[0]).created
    expect(stream.refusal(requests[1]), "INVALID_INPUT")
    expect(of_call(lambda: wire.open("tiny-gru", ["pair", "pair"])), "INVALID_INPUT", field="session_ids")


def test_attaching_needs_ids(wire: Wire, stream: RawStream) -> None:
    command, requests = stream.opening("tiny-gru", 2, "ATTACH")
    stream.send(command)
    for request in requests:
        expect(stream.refusal(request), "INVALID_INPUT")
    expect(of_call(lambda: wire.open("tiny-gru", 2, "ATTACH")), "INVALID_INPUT", field="session_ids")


def test_an_open_with_unequal_columns_is_refused(stream: RawStream) -> None:
    requests = stream.new_requests(3)
    stream.send(Command(open=OpenCommand(requests=requests, model="tiny-gru", session_ids=["a", "b"])))
    for request in requests:
        expect(stream.refusal(request), "INVALID_INPUT")


def test_ids_or_a_count_and_not_both(wire: Wire) -> None:
    for request in (
        pb.OpenSessionsRequest(model="tiny-gru"),
        pb.OpenSessionsRequest(model="tiny-gru", session_ids=["a"], count=1),
    ):
        refused = of_call(partial(wire.sessions.OpenSessions, request))
        expect(refused, "INVALID_INPUT", field="count")


def test_ten_thousand_sessions_are_opened_at_once_and_no_more(wire: Wire, stream: RawStream) -> None:
    before = total_size(wire)
    command, requests = stream.opening("tiny-gru", 10_001)
    stream.send(command)
    for request in requests:
        expect(stream.refusal(request), "INVALID_INPUT")
    expect(of_call(lambda: wire.open("tiny-gru", 10_001)), "INVALID_INPUT", field="count")
    assert total_size(wire) == before
    opened = stream.open_many("tiny-gru", 10_000)
    assert len({one.handle for one in opened}) == 10_000
    assert total_size(wire) == before + 10_000
    handles = [one.handle for one in opened]
    requests = stream.run(handles, [[place % 11] for place in range(10_000)])
    assert [stream.answer(request).position for request in requests] == [1] * 10_000
    closing = stream.close_sessions(handles)
    for request in closing:
        stream.done(request)
    assert total_size(wire) == before


@pytest.mark.parametrize("durability", ["PERIODIC", "SYNC"])
def test_durability_needs_a_store(wire: Wire, stream: RawStream, durability: str) -> None:
    command, [request] = stream.opening("tiny-gru", ["durable"], durability=durability)
    stream.send(command)
    expect(stream.refusal(request), "NO_STORE")
    expect(of_call(lambda: wire.open("tiny-gru", durability=durability)), "NO_STORE", field="durability")
    assert stream.open("tiny-gru", "durable", durability="NONE").created


def test_a_session_is_told_as_it_stands(wire: Wire, session: Follower) -> None:
    told = wire.sessions.GetSession(pb.GetSessionRequest(session_id=session.id)).session
    assert (told.id, told.model, told.model_version) == (session.id, "tiny-gru", 1)
    assert (told.position, told.epoch, told.num_pending_tokens) == (3, 1, 0)
    assert told.durability == Durability.DURABILITY_NONE
    assert not told.HasField("durable_position")
    assert told.tier == pb.Tier.TIER_DEVICE
    assert told.attached
    assert 0 <= told.idle_seconds <= told.age_seconds < 60
    fresh = wire.open("tiny-gru").session_ids[0]
    told = wire.sessions.GetSession(pb.GetSessionRequest(session_id=fresh)).session
    assert (told.position, told.attached) == (0, False)


def test_sessions_are_listed_by_id_page_by_page(wire: Wire) -> None:
    ids = [f"page-{number:03}" for number in np.random.default_rng(0).permutation(25)]
    wire.open("tiny-simplified_gru", ids)
    found: list[str] = []
    token, pages = "", 0
    while True:
        request = pb.ListSessionsRequest(model="tiny-simplified_gru", page_size=10, page_token=token)
        page = wire.sessions.ListSessions(request)
        assert page.total_size == 25
        found += [one.id for one in page.sessions]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert (found, pages) == (sorted(ids), 3)
    everything = wire.sessions.ListSessions(pb.ListSessionsRequest(page_size=10_000))
    assert [one.id for one in everything.sessions] == sorted(one.id for one in everything.sessions)
    assert len(everything.sessions) == everything.total_size >= 27
    assert not wire.sessions.ListSessions(pb.ListSessionsRequest(model="no-such-model")).sessions
    too_many = pb.ListSessionsRequest(page_size=10_001)
    expect(of_call(lambda: wire.sessions.ListSessions(too_many)), "INVALID_INPUT", field="page_size")
