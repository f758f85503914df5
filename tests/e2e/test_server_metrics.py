"""Metrics: all there, well named, and true: counts equal what a test did."""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import generate
from tests.support.metrics import Metrics
from tests.support.programs import require_program
from tests.support.refusals import of_call
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.wire import Follower, Wire

MODEL = "tiny-gru"
# DESIGN.md section 7, without those of the state store.
PROMISED = {
    "sessions",
    "session_capacity",
    "sessions_opened_total",
    "sessions_closed_total",
    "sessions_rejected_total",
    "session_lifetime_seconds",
    "steps_total",
    "run_failures_total",
    "runs_deduplicated_total",
    "steps_pending",
    "step_duration_seconds",
    "step_queue_seconds",
    "tick_duration_seconds",
    "tick_compute_seconds",
    "batch_size",
    "batch_padding_rows_total",
    "inter_token_seconds",
    "parked_total",
    "unparked_total",
    "held_answer_bytes",
    "streams",
    "stream_unsent_bytes",
    "event_loop_lag_seconds",
    "state_bytes",
    "build_info",
    "model_info",
}


@pytest.fixture(scope="module")
def server(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of its own, so that nobody else moves its counts."""
    log_file = tmp_path_factory.mktemp("metrics") / "server.log"
    settings: dict[str, str | int | float | bool] = {"max_sessions": 20, "max_slots": 4, "idle_timeout_seconds": 2}
    with ServerProcess(log_file, models_directory, settings) as process:
        yield process


@pytest.fixture
def before(server: ServerProcess) -> Metrics:
    """When the streams of the tests before have ended, which they do a moment after their clients have gone."""
    return Metrics.wait(server, lambda metrics: metrics.value("cellserve_streams") == 0)


def samples(server: ServerProcess) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def test_every_metric_of_the_design_is_there(wire: Wire, server: ServerProcess) -> None:
    session = Follower(wire, wire.stream())
    session.step([1, 2])
    generate(session, max_tokens=20)
    wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session.id))
    of_call(lambda: wire.step(session.id, [1]))
    of_call(lambda: wire.open("no-such-model"))
    found = {re.sub("_(bucket|sum|count|created)$", "", name) for name, _, _ in samples(server)}
    assert {f"cellserve_{name}" for name in PROMISED} <= found
    assert {"grpc_server_started_total", "grpc_server_handled_total", "grpc_server_handling_seconds"} <= found
    assert {name for name in found if not name.startswith("cellserve_")} <= {
        "grpc_server_started_total",
        "grpc_server_handled_total",
        "grpc_server_handling_seconds",
        "grpc_server_started",
        "grpc_server_handled",
    }


def test_promtool_has_no_complaint(wire: Wire, server: ServerProcess) -> None:
    promtool = require_program("promtool")
    session = Follower(wire, wire.stream())
    generate(session, max_tokens=20)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=server.metrics(), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_durations_are_counted_from_50_microseconds_in_steps_of_at_most_a_half(server: ServerProcess) -> None:
    bounds: dict[str, list[float]] = {}
    for name, labels, _ in samples(server):
        if name.endswith("_seconds_bucket") and name != "cellserve_session_lifetime_seconds_bucket":
            key = name + str(sorted((label, value) for label, value in labels.items() if label != "le"))
            bounds.setdefault(key, []).append(float(labels["le"]))
    assert bounds
    for name, found in bounds.items():
        *finite, last = found
        assert finite[0] == pytest.approx(50e-6), name
        assert last == float("inf"), name
        assert finite[-1] >= 10, name
        # Bounds are written with three digits.
        assert all(low < high <= 1.51 * low for low, high in pairwise(finite)), name


def test_no_session_id_is_a_label(wire: Wire, server: ServerProcess) -> None:
    stream = wire.stream()
    Follower(wire, stream, session_id="tell-tale").step([1])
    expected = {"model", "tier", "reason", "kind", "le", "version", "python", "grpcio", "cell", "device"}
    expected |= {"grpc_type", "grpc_service", "grpc_method", "grpc_code"}
    text = server.metrics()
    assert "tell-tale" not in text
    assert {label for _, labels, _ in samples(server) for label in labels} <= expected


def test_steps_are_tokens(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    sessions = [Follower(wire, stream) for _ in range(3)]
    for session in sessions:
        session.step([1] * 100)
        session.step([2])
    wire.step(sessions[0].id, [3] * 7)
    result = generate(sessions[1], max_tokens=33)
    # What is refused or repeated is no step.
    stream.step(sessions[2].handle, [1] * 100, outputs(states=True), position=0)
    stream.refuse(sessions[2].handle, [99])
    after = Metrics.of(server)
    assert after.since(before, "cellserve_steps_total", model=MODEL, kind="run") == 3 * 101 + 7
    assert after.since(before, "cellserve_steps_total", model=MODEL, kind="generate") == len(result.tokens) == 33
    assert after.total("cellserve_steps_total") - before.total("cellserve_steps_total") == 3 * 101 + 7 + 33
    assert after.value("cellserve_steps_pending") == 0


def test_every_run_is_timed_once(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    session = Follower(wire, stream)
    for _ in range(20):
        session.step([1] * 300)  # each of several ticks
    requests = stream.run([session.handle] * 5, [[1]] * 5, outputs(states=True), positions=range(6000, 6005))
    for request in requests:
        session.take([1], request)
    # Durations are counted once the answer has been written.
    name = "cellserve_step_duration_seconds_count"
    after = Metrics.wait(server, lambda found: found.since(before, name, model=MODEL) >= 25)
    assert after.since(before, name, model=MODEL) == 25
    assert after.since(before, "cellserve_step_queue_seconds_count", model=MODEL) == 25
    ticks = after.since(before, "cellserve_tick_duration_seconds_count", model=MODEL)
    assert ticks == after.since(before, "cellserve_tick_compute_seconds_count", model=MODEL)
    assert ticks == after.since(before, "cellserve_batch_size_count", model=MODEL)
    assert 20 * 2 + 5 <= ticks <= 20 * 300 + 5
    total = after.since(before, "cellserve_step_duration_seconds_sum", model=MODEL)
    assert total >= after.since(before, "cellserve_tick_compute_seconds_sum", model=MODEL) > 0


def test_a_batch_is_as_large_as_the_sessions_that_share_it(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    handles = [one.handle for one in stream.open_many(MODEL, 4)]
    for request in stream.run(handles, [[1]] * 4):
        stream.answer(request)
    after = Metrics.of(server)
    assert after.since(before, "cellserve_batch_size_sum", model=MODEL) == 4
    assert after.since(before, "cellserve_batch_size_count", model=MODEL) == 1


def test_sessions_are_counted_from_open_to_end(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    open_before = sum(before.value("cellserve_sessions", model=MODEL, tier=tier) for tier in ("device", "host"))
    opened = stream.open_many(MODEL, 5)
    wire.open(MODEL, 2)
    stream.open(MODEL, opened[0].session_id)  # an attach is no new session
    fork = wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=opened[0].session_id))
    after = Metrics.of(server)
    assert after.since(before, "cellserve_sessions_opened_total", model=MODEL) == 8
    sessions = {tier: after.value("cellserve_sessions", model=MODEL, tier=tier) for tier in ("device", "host")}
    assert sum(sessions.values()) == open_before + 8
    row_bytes = 2 * 8 * 4
    for tier, number in sessions.items():
        assert after.value("cellserve_state_bytes", model=MODEL, tier=tier) == number * row_bytes
    assert after.value("cellserve_session_capacity") == 20
    assert after.value("cellserve_streams") == 1
    for request in stream.close_sessions([one.handle for one in opened[1:]]):
        stream.done(request)
    wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=fork.session_id))
    closed = Metrics.of(server)
    assert closed.since(before, "cellserve_sessions_closed_total", reason="SESSION_CLOSED") == 5
    assert closed.since(before, "cellserve_session_lifetime_seconds_count") == 5
    expired = Metrics.wait(
        server, lambda found: found.since(before, "cellserve_sessions_closed_total", reason="SESSION_EXPIRED") >= 3
    )
    assert expired.since(before, "cellserve_sessions_closed_total", reason="SESSION_EXPIRED") == 3


def test_refusals_are_counted_by_reason(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    session = Follower(wire, stream)
    session.step([1, 2])
    for _ in range(3):
        stream.refuse(session.handle, [99])
    stream.refuse(session.handle, [1], position=9)
    stream.refuse(12345, [1])
    of_call(lambda: wire.step(session.id, [1], position=1000))
    of_call(lambda: wire.open(MODEL, 21))
    of_call(lambda: wire.open(MODEL, [session.id], "CREATE"))
    of_call(lambda: wire.step("never-was", [1]))
    after = Metrics.of(server)
    failures = {"INVALID_INPUT": 3, "POSITION_GAP": 2, "STALE_HANDLE": 1, "SESSION_NOT_FOUND": 1}
    for reason, number in failures.items():
        assert after.since(before, "cellserve_run_failures_total", reason=reason) == number, reason
    assert after.since(before, "cellserve_sessions_rejected_total", reason="SESSION_LIMIT") > 0
    assert after.since(before, "cellserve_sessions_rejected_total", reason="SESSION_EXISTS") == 1


def test_repeats_are_counted(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    stream = wire.stream()
    session = Follower(wire, stream)
    session.step([1, 2, 3])
    for _ in range(4):
        stream.step(session.handle, [1, 2, 3], outputs(states=True), position=0)
    after = Metrics.of(server)
    assert after.since(before, "cellserve_runs_deduplicated_total") == 4
    # 3 tokens with 2 layers of 8 float32 are held.
    assert after.value("cellserve_held_answer_bytes") - before.value("cellserve_held_answer_bytes") == 3 * 2 * 8 * 4
    stream.acknowledge(session.handle, 3)
    stream.step(session.handle, [4])
    session.consumed([4])
    released = Metrics.of(server)
    assert released.value("cellserve_held_answer_bytes") == before.value("cellserve_held_answer_bytes")


def test_calls_are_counted_by_method_and_code(wire: Wire, server: ServerProcess, before: Metrics) -> None:
    def handled(found: Metrics, method: str, code: str, kind: str = "unary") -> float:
        labels = {"grpc_service": "cellserve.v1.SessionService", "grpc_type": kind}
        name = "grpc_server_handled_total"
        return found.since(before, name, grpc_method=method, grpc_code=code, **labels)

    session_id = wire.open(MODEL).session_ids[0]
    for _ in range(3):
        wire.step(session_id, [1])
    of_call(lambda: wire.step(session_id, [99]))
    of_call(lambda: wire.step("never-was", [1]))
    list(wire.sessions.Generate(pb.GenerateRequest(session_id=session_id, max_tokens=3)))
    assert wire.stream().finish() is grpc.StatusCode.OK
    after = Metrics.wait(server, lambda found: handled(found, "Stream", "OK", "bidi_stream") >= 1)
    assert handled(after, "Step", "OK") == 3
    assert handled(after, "Step", "INVALID_ARGUMENT") == 1
    assert handled(after, "Step", "NOT_FOUND") == 1
    assert handled(after, "OpenSessions", "OK") == 1
    assert handled(after, "Generate", "OK", "server_stream") == 1
    assert handled(after, "Stream", "OK", "bidi_stream") == 1


def test_the_build_and_the_models_are_told(server: ServerProcess) -> None:
    metrics = Metrics.of(server)
    assert metrics.value("cellserve_model_info", model="tiny-lstm", version="1", cell="lstm", device="cpu") == 1
    assert metrics.total("cellserve_build_info") == 1
