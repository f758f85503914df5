"""Several front-end processes before one engine: who is served by which of them makes no difference to anybody."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.e2e.test_server_standard_services import SERVICES, reflect
from tests.support.forking import ForkedServer, Forker
from tests.support.generating import begin, generate
from tests.support.health import health
from tests.support.metrics import Metrics
from tests.support.processes import has_loaded
from tests.support.refusals import expect, of_call
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.wire import LONG, Follower, Wire
from tests.support.workers import connections, sockets_of, worker_pids

NUM_WORKERS = 3
MODEL = "tiny-gru"

Groups = list[list[Wire]]


@pytest.fixture(scope="module")
def server(forker: Forker, models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log_file = tmp_path_factory.mktemp("workers") / "server.log"
    server = ForkedServer(log_file, models_directory, {"workers": NUM_WORKERS}, forker=forker)
    with server:
        yield server
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def groups(server: ServerProcess) -> Iterator[Groups]:
    """Connections, by the worker that has taken them; each has some."""
    with connections(server) as found:
        assert all(len(group) > 1 for group in found.values())
        yield list(found.values())


def test_connections_are_dealt_out_and_every_worker_has_the_standard_services(groups: Groups) -> None:
    assert len({sockets_of(group[0]) for group in groups}) == NUM_WORKERS
    for group in groups:
        for service in ("", *SERVICES[:2]):
            assert health(group[0].channel, service) == "SERVING"
        listed = reflect(group[0], list_services="").list_services_response.service
        assert sorted(service.name for service in listed) == SERVICES


def test_workers_have_not_loaded_torch(server: ServerProcess) -> None:
    assert server.process is not None
    pids = worker_pids(server)
    assert len(pids) == NUM_WORKERS
    assert has_loaded(server.process.pid, "libtorch")
    for pid in pids:
        assert has_loaded(pid, "cygrpc")
        assert not has_loaded(pid, "torch")


def test_sessions_of_all_workers_share_batches_and_are_the_oracles(groups: Groups) -> None:
    sessions = [Follower(wire, wire.stream()) for group in groups for wire in group[:2]]
    assert len({session.handle for session in sessions}) == len(sessions)
    random = np.random.default_rng(1)
    for _ in range(5):
        runs = [random.integers(0, 11, size=3).tolist() for _ in sessions]
        wanted = outputs(states=True)
        sent = [one.stream.run([one.handle], [run], wanted)[0] for one, run in zip(sessions, runs, strict=True)]
        for session, run, request in zip(sessions, runs, sent, strict=True):
            session.take(run, request)
    for session in sessions:
        session.check()


def test_a_session_is_taken_over_from_worker_to_worker(groups: Groups) -> None:
    streams = [group[0].stream() for group in groups]
    session = Follower(groups[0][0], streams[0])
    session.step([1, 2, 3])
    for number, stream in enumerate([*streams[1:], streams[0]]):
        before, handle = session.stream, session.handle
        opened = stream.open(session.model, session.id, "ATTACH")
        lost = before.loss()
        assert (lost.handle, lost.reason) == (handle, "SESSION_MOVED")
        expect(before.refuse(handle, [5]), "SESSION_MOVED")
        session.stream = stream
        session.attach(opened)
        session.step([number])
    session.check()


def test_a_takeover_withdraws_what_another_workers_stream_has_queued(groups: Groups) -> None:
    holder, taker = groups[0][0].stream(), groups[1][0].stream()
    session = holder.open("pycode")
    wanted = outputs("every", next_token=True)
    running, queued = holder.run([session.handle] * 2, [LONG, b"ab"], wanted, positions=[0, len(LONG)])
    holder.begun(running)
    opened = taker.open("pycode", session.session_id)
    assert opened.position == len(LONG)
    expect(holder.refusal(queued), "SESSION_MOVED")
    assert holder.answer(running).num_tokens == len(LONG)
    assert taker.step(opened.handle, b"xy").position == len(LONG) + 2


def test_a_handle_is_of_no_use_on_another_workers_stream(groups: Groups) -> None:
    session = Follower(groups[0][0], groups[0][0].stream())
    session.step([1])
    with session.wire.unmoved(session.id):
        expect(groups[1][0].stream().refuse(session.handle, [2]), "STALE_HANDLE")


def test_a_run_is_repeated_over_another_worker(groups: Groups) -> None:
    first, second = groups[0][0].stream(), groups[1][0]
    session = Follower(groups[0][0], first)
    answer = session.step([1, 2, 3])
    stepped = second.step(session.id, [1, 2, 3], outputs(states=True), position=0)
    values = np.frombuffer(stepped.outputs.states.values, "<f4")
    np.testing.assert_array_equal(values, answer.outputs["states"].ravel())
    session.check()


def test_calls_with_a_request_id_are_done_once_whichever_worker_they_reach(groups: Groups) -> None:
    wires = [group[0] for group in groups]
    opened = [wire.open(MODEL, 3, request_id="open-over-workers") for wire in wires]
    assert opened == [opened[0]] * NUM_WORKERS
    key = opened[0].session_ids[0]
    wires[0].step(key, [1, 2])
    reset = pb.ResetSessionRequest(session_id=key, request_id="reset-over-workers")
    assert wires[0].sessions.ResetSession(reset).epoch == 2
    wires[0].step(key, [3])
    with wires[0].unmoved(key):
        assert [wire.sessions.ResetSession(reset).epoch for wire in wires] == [2] * NUM_WORKERS
    other = pb.ResetSessionRequest(session_id=opened[0].session_ids[1], request_id="reset-over-workers")
    expect(of_call(lambda: wires[1].sessions.ResetSession(other)), "INVALID_INPUT", field="request_id")


def test_calls_with_a_request_id_are_done_once_when_workers_get_them_at_the_same_time(groups: Groups) -> None:
    wires = [wire for group in groups for wire in group[:2]]
    source = wires[0].open("pycode").session_ids[0]
    stream = wires[0].stream()
    handle = stream.open("pycode", source, "ATTACH").handle
    [running] = stream.run([handle], [LONG], outputs("every", next_token=True))
    stream.begun(running)
    # The forks wait for the run that is under way, so all of them are there before the first is done.
    request = pb.ForkSessionRequest(session_id=source, request_id="fork-over-workers")
    calls = [wire.sessions.ForkSession.future(request, timeout=30) for wire in wires]
    forks = [call.result() for call in calls]
    assert forks == [forks[0]] * len(wires)
    assert forks[0].position == len(LONG)
    stream.answer(running)


def test_a_generate_over_one_worker_is_what_it_is_over_another(groups: Groups) -> None:
    tokens = []
    for group in groups:
        session = Follower(group[0], group[0].stream())
        session.step([1, 2, 3])
        tokens.append(generate(session, max_tokens=50, seed=5).tokens)
    assert tokens == [tokens[0]] * NUM_WORKERS


def test_a_generate_is_broken_off_when_its_call_ends(groups: Groups) -> None:
    session, other = Follower(groups[0][0], groups[0][0].stream()), groups[1][0]
    call = begin(session)
    expect(of_call(lambda: other.step(session.id, [1])), "SESSION_BUSY")
    call.cancel()
    asked = pb.GetSessionRequest(session_id=session.id)
    while other.sessions.GetSession(asked, timeout=10).session.generating:
        pass
    other.step(session.id, [1])


def test_metrics_are_of_all_workers_together(server: ServerProcess, groups: Groups) -> None:
    before = Metrics.of(server)
    streams = [wire.stream() for group in groups for wire in group[:2]]
    for stream in streams:
        session = stream.open(MODEL)
        stream.step(session.handle, [1, 2, 3])
        stream.step(session.handle, [4])
        expect(stream.refuse(session.handle, [99]), "INVALID_INPUT")
        stream.send_bytes(b"no frame")
    for group in groups:
        expect(of_call(lambda: group[0].step("nobody", [1])), "SESSION_NOT_FOUND")  # noqa: B023 - called at once
    number = len(streams)
    stream_labels = {
        "grpc_type": "bidi_stream",
        "grpc_service": "cellserve.v1.SessionService",
        "grpc_method": "Stream",
    }

    def come_so_far(found: Metrics) -> bool:
        return found.since(before, "cellserve_run_failures_total", reason="INVALID_INPUT") == 2 * number

    after = Metrics.wait(server, come_so_far)
    assert after.since(before, "cellserve_steps_total", model=MODEL, kind="run") == 4 * number
    assert after.since(before, "cellserve_step_duration_seconds_count", model=MODEL) == 2 * number
    assert after.since(before, "cellserve_streams") == number
    assert after.since(before, "grpc_server_started_total", **stream_labels) == number
    assert after.since(before, "cellserve_run_failures_total", reason="SESSION_NOT_FOUND") == NUM_WORKERS
    unary = {"grpc_type": "unary", "grpc_service": "cellserve.v1.SessionService", "grpc_method": "Step"}
    assert after.since(before, "grpc_server_handled_total", grpc_code="NOT_FOUND", **unary) == NUM_WORKERS
    for stream in streams:
        stream.finish()
    later = Metrics.wait(server, lambda found: found.value("cellserve_streams") == before.value("cellserve_streams"))
    assert later.since(before, "grpc_server_handled_total", grpc_code="OK", **stream_labels) == number
    assert later.since(before, "cellserve_stream_unsent_bytes") == 0


def test_large_answers_and_states_cross_whole(groups: Groups) -> None:
    session = Follower(groups[0][0], groups[0][0].stream(), "pycode")
    wanted = outputs(states=True, head_outputs=True)
    answer = session.stream.step(session.handle, LONG, wanted)  # some 6 MB
    expected = groups[0][0].trace("pycode", LONG)
    np.testing.assert_allclose(answer.outputs["states"], expected.states, rtol=0, atol=2e-5)
    state = groups[0][0].state(session.id)
    imported = groups[1][0].open("pycode", 1, states=[state.SerializeToString()])
    assert groups[1][0].state(imported.session_ids[0]) == state
