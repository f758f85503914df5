"""Portable states: exported, imported, forked, reset; and refused where they do not fit."""

import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.model_service_pb2 import GetModelRequest
from cellserve.v1.values_pb2 import SessionState
from tests.support.refusals import expect, of_call
from tests.support.server import ServerProcess
from tests.support.stream import RawStream, outputs
from tests.support.wire import LONG, Follower, Wire, state_values

pytestmark = pytest.mark.usefixtures("witnesses")


def checksum(state: SessionState) -> int:
    """As the contract words it."""
    head = struct.pack("<QII", state.position, state.num_layers, state.state_size)
    return zlib.crc32(state.model_fingerprint + head + state.values)


def changed(state: SessionState, **fields: object) -> SessionState:
    """Another state with a right checksum."""
    other = SessionState()
    other.CopyFrom(state)
    for name, value in fields.items():
        setattr(other, name, value)
    if "checksum" not in fields:
        other.checksum = checksum(other)
    return other


def test_an_exported_state_is_what_the_contract_says(wire: Wire, session: Follower) -> None:
    state = wire.state(session.id)
    model = wire.models.GetModel(GetModelRequest(name=session.model)).model
    assert (state.format, state.position, state.num_layers, state.state_size) == (1, 3, 2, 8)
    assert state.model_fingerprint == model.fingerprint
    assert state.checksum == checksum(state)
    session.check()


def test_a_session_that_has_not_run_has_the_zero_state(wire: Wire, stream: RawStream) -> None:
    for model in ("tiny-gru", "tiny-lstm", "vectors-leaky_rnn"):
        state = wire.state(stream.open(model).session_id)
        assert state.position == 0
        assert not state_values(state).any()


def test_an_export_waits_for_the_runs_accepted_before_it(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    [running] = stream.run([session.handle], [LONG], outputs("every", next_token=True))
    stream.begun(running)
    state = wire.state(session.session_id)
    assert state.position == len(LONG)
    expected = wire.trace("pycode", LONG).states[-1]
    np.testing.assert_allclose(state_values(state), expected, rtol=0, atol=2e-5)


def test_a_session_begins_with_a_state_and_goes_on_as_the_exported_one(wire: Wire, session: Follower) -> None:
    packed = wire.state(session.id).SerializeToString()
    for number in range(2):
        stream = session.stream
        if number:
            opened = stream.open(session.model, states=[packed], mode="CREATE")
        else:
            created = wire.open(session.model, states=[packed], mode="CREATE")
            assert (list(created.positions), list(created.created)) == ([3], [True])
            opened = stream.open(session.model, created.session_ids[0], "ATTACH")
        assert opened.position == 3
        copy = stream.step(opened.handle, [5, 6], outputs(states=True), position=3)
        expected = wire.oracle(session.model).run([1, 2, 3, 5, 6]).states[-2:]
        np.testing.assert_allclose(copy.outputs["states"], expected, rtol=0, atol=2e-5)


def test_a_state_goes_to_another_server_bit_for_bit(small_server: ServerProcess, wire: Wire, session: Follower) -> None:
    state = wire.state(session.id)
    with Wire(small_server) as other:
        created = other.open(session.model, states=[state.SerializeToString()])
        assert other.state(created.session_ids[0]) == state


def test_an_import_replaces_the_state_and_begins_an_epoch(wire: Wire, session: Follower) -> None:
    donor = Follower(wire, session.stream, session.model)
    donor.step([9, 8, 7, 6, 5])
    request = pb.ImportSessionRequest(session_id=session.id, state=wire.state(donor.id))
    imported = wire.sessions.ImportSession(request)
    assert (imported.position, imported.epoch) == (5, 2)
    lost = session.stream.loss()
    assert (lost.handle, lost.reason) == (session.handle, "STALE_HANDLE")
    assert wire.state(session.id) == wire.state(donor.id)
    opened = session.stream.open(session.model, session.id, "ATTACH")
    session.restart(opened.handle)
    session.consumed([9, 8, 7, 6, 5])
    session.step([4])
    # Answers of the state that was replaced are no longer held.
    expect(session.refuse([1, 2, 3], outputs(states=True), position=0), "ANSWER_NOT_HELD", position=6)


def test_an_import_waits_for_the_runs_accepted_before_it(wire: Wire, stream: RawStream) -> None:
    session, empty = stream.open("pycode"), stream.open("pycode")
    [running] = stream.run([session.handle], [LONG], outputs("every", next_token=True))
    stream.begun(running)
    state = wire.state(empty.session_id)
    imported = wire.sessions.ImportSession(pb.ImportSessionRequest(session_id=session.session_id, state=state))
    assert imported.position == 0
    assert stream.answer(running).num_tokens == len(LONG)
    assert wire.state(session.session_id) == state


def test_a_fork_is_an_independent_copy(wire: Wire, session: Follower) -> None:
    forked = wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id, fork_session_id="my-fork"))
    assert (forked.session_id, forked.position, forked.epoch) == ("my-fork", 3, 1)
    assert wire.state("my-fork") == wire.state(session.id)
    fork = Follower(wire, session.stream, session_id="my-fork", mode="ATTACH")
    fork.consumed([1, 2, 3])
    fork.step([5, 5])
    session.step([6, 6])
    fork.check()
    session.check()


def test_a_fork_waits_for_the_runs_accepted_before_it(wire: Wire, stream: RawStream) -> None:
    session = stream.open("pycode")
    [running] = stream.run([session.handle], [LONG], outputs("every", next_token=True))
    stream.begun(running)
    forked = wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.session_id))
    assert forked.position == len(LONG)
    assert wire.state(forked.session_id) == wire.state(session.session_id)
    wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=forked.session_id))


def test_a_fork_onto_an_id_that_exists_is_refused(wire: Wire, session: Follower) -> None:
    for taken in (session.id, Follower(wire, session.stream).id):
        request = pb.ForkSessionRequest(session_id=session.id, fork_session_id=taken)
        refused = of_call(partial(wire.sessions.ForkSession, request))
        expect(refused, "SESSION_EXISTS", field="fork_session_id")
    request = pb.ForkSessionRequest(session_id=session.id, fork_session_id="no/slashes")
    expect(of_call(lambda: wire.sessions.ForkSession(request)), "INVALID_INPUT", field="fork_session_id")


def test_a_reset_waits_for_the_runs_before_it_and_sets_the_zero_state(wire: Wire, stream: RawStream) -> None:
    session = Follower(wire, stream)
    [run] = stream.run([session.handle], [[1] * 300], outputs(states=True))
    resetting = stream.reset(session.handle)
    session.take([1] * 300, run)
    session.restart(stream.done(resetting).handle)
    session.check()
    session.step([2])


BAD_STATES: dict[str, Callable[[SessionState], bytes]] = {
    "wrong checksum": lambda state: changed(state, checksum=state.checksum ^ 1).SerializeToString(),
    "damaged value": lambda state: changed(
        state, values=b"\1" + state.values[1:], checksum=state.checksum
    ).SerializeToString(),
    "damaged position": lambda state: changed(state, position=4, checksum=state.checksum).SerializeToString(),
    "another model": lambda state: changed(state, model_fingerprint=bytes(32)).SerializeToString(),
    "no model": lambda state: changed(state, model_fingerprint=b"").SerializeToString(),
    "another format": lambda state: changed(state, format=2).SerializeToString(),
    "too few values": lambda state: changed(state, values=state.values[:-4]).SerializeToString(),
    "too many layers": lambda state: changed(state, num_layers=4, values=2 * state.values).SerializeToString(),
    "another division": lambda state: changed(state, num_layers=1, state_size=16).SerializeToString(),
    "vast shape": lambda state: changed(state, num_layers=2**32 - 1, state_size=2**32 - 1).SerializeToString(),
    "not a number": lambda state: changed(
        state, values=struct.pack("<f", float("nan")) + state.values[4:]
    ).SerializeToString(),
    "infinite": lambda state: changed(
        state, values=state.values[:-4] + struct.pack("<f", float("-inf"))
    ).SerializeToString(),
    "vast position": lambda state: changed(state, position=2**64 - 1).SerializeToString(),
    "empty": lambda state: b"",
    "garbage": lambda state: b"\xff\xfe garbage",
    "cut": lambda state: state.SerializeToString()[:-7],
}


@pytest.mark.parametrize("damage", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_everywhere(
    wire: Wire, session: Follower, damage: Callable[[SessionState], bytes]
) -> None:
    stream, bad = session.stream, damage(wire.state(session.id))
    command, [request] = stream.opening(session.model, ["not-to-be"], states=[bad])
    stream.send(command)
    expect(stream.refusal(request), "STATE_MISMATCH")
    expect(of_call(lambda: wire.open(session.model, ["not-to-be"], states=[bad])), "STATE_MISMATCH", field="states")
    get = pb.GetSessionRequest(session_id="not-to-be")
    expect(of_call(lambda: wire.sessions.GetSession(get)), "SESSION_NOT_FOUND")
    if damage in (BAD_STATES["garbage"], BAD_STATES["cut"]):
        return  # no SessionState at all
    importing = pb.ImportSessionRequest(session_id=session.id, state=SessionState.FromString(bad))
    with wire.unmoved(session.id):
        expect(of_call(lambda: wire.sessions.ImportSession(importing)), "STATE_MISMATCH", field="state")


def test_an_import_without_a_state_is_invalid_input(wire: Wire, session: Follower) -> None:
    importing = pb.ImportSessionRequest(session_id=session.id)
    with wire.unmoved(session.id):
        expect(of_call(lambda: wire.sessions.ImportSession(importing)), "INVALID_INPUT", field="state")


def test_the_state_of_another_model_is_refused(wire: Wire, session: Follower) -> None:
    foreign = wire.state(Follower(wire, session.stream, "tiny-gru_reset_after").id)
    importing = pb.ImportSessionRequest(session_id=session.id, state=foreign)
    with wire.unmoved(session.id):
        expect(of_call(lambda: wire.sessions.ImportSession(importing)), "STATE_MISMATCH", field="state")


def test_of_good_and_bad_states_on_a_stream_the_good_ones_begin(wire: Wire, session: Follower) -> None:
    good = wire.state(session.id).SerializeToString()
    command, requests = session.stream.opening(session.model, 3, states=[good, b"bad", good])
    session.stream.send(command)
    assert session.stream.opened(requests[0]).position == 3
    expect(session.stream.refusal(requests[1]), "STATE_MISMATCH")
    assert session.stream.opened(requests[2]).position == 3
    before = wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size
    expect(of_call(lambda: wire.open(session.model, 3, states=[good, b"bad", good])), "STATE_MISMATCH")
    assert wire.sessions.ListSessions(pb.ListSessionsRequest()).total_size == before


def test_a_state_begins_new_sessions_alone(wire: Wire, session: Follower) -> None:
    state = wire.state(session.id).SerializeToString()
    command, [request] = session.stream.opening(session.model, [session.id], states=[state])
    session.stream.send(command)
    expect(session.stream.refusal(request), "SESSION_EXISTS")
    refused = of_call(lambda: wire.open(session.model, [session.id], states=[state]))
    expect(refused, "SESSION_EXISTS", field="session_ids")


def test_there_is_one_state_for_each_session_or_none(wire: Wire, session: Follower) -> None:
    state = wire.state(session.id).SerializeToString()
    command, requests = session.stream.opening(session.model, 2, states=[state])
    session.stream.send(command)
    for request in requests:
        expect(session.stream.refusal(request), "INVALID_INPUT")
    expect(of_call(lambda: wire.open(session.model, 2, states=[state])), "INVALID_INPUT", field="states")
