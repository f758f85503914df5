"""A reader that does not read slows its own stream alone, and costs the server a bounded amount of memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.generating import request_of
from tests.support.metrics import Metrics
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.wire import LONG, SMALL_WINDOW, Follower, Wire

MAX_UNSENT_BYTES = 65_536
# Parts of 32 tokens with 2 KB of state each (64 KB) come on top, before the engine hears that the stream rests.
MOST_UNSENT_BYTES = MAX_UNSENT_BYTES + 4 * 32 * (2048 + 64)


@pytest.fixture(scope="module")
def server(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log_file = tmp_path_factory.mktemp("slow-reader") / "server.log"
    with ServerProcess(log_file, models_directory, {"max_stream_unsent_bytes": MAX_UNSENT_BYTES}) as process:
        yield process


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Wire]:
    with Wire(server, SMALL_WINDOW) as connection:
        yield connection


def position(wire: Wire, session_id: str) -> int:
    return wire.sessions.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=30).session.position


def rested(wire: Wire, session_id: str, witness: Follower) -> int:
    """Wait until the session moves no more while the witness makes forty steps; returns its position."""
    while True:
        before = position(wire, session_id)
        for _ in range(40):
            witness.step([1])
        if position(wire, session_id) == before:
            return before


@pytest.mark.parametrize("connection", ["the same connection", "its own connection"])
def test_a_stream_that_is_not_read_rests_while_another_goes_on(wire: Wire, connection: str) -> None:
    slow = wire.stream() if connection == "the same connection" else wire.other(SMALL_WINDOW).stream()
    witness = Follower(wire, wire.stream())
    session = slow.open("pycode")
    runs = slow.run([session.handle] * 2, [LONG, b"bc"], outputs(states=True), positions=[0, len(LONG)])
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") > MAX_UNSENT_BYTES // 2)
    resting = rested(wire, session.session_id, witness)
    assert 0 < resting < len(LONG)
    assert Metrics.of(wire.server).value("cellserve_stream_unsent_bytes") <= MOST_UNSENT_BYTES
    # Everything is there for who reads at last.
    answer = slow.answer(runs[0])
    expected = wire.trace("pycode", LONG).states
    np.testing.assert_allclose(answer.outputs["states"], expected, rtol=0, atol=2e-5)
    assert slow.answer(runs[1]).position == len(LONG) + 2
    slow.finish()
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") == 0)
    witness.step([2])


def test_a_stream_that_is_not_read_is_not_read_from_either(wire: Wire) -> None:
    slow, witness = wire.other(SMALL_WINDOW).stream(), Follower(wire, wire.stream())
    session = slow.open("pycode")
    slow.run([session.handle], [LONG], outputs(states=True))
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") > MAX_UNSENT_BYTES // 2)
    rested(wire, session.session_id, witness)
    before = resident_bytes(wire.server)
    # 40 MB of frames, which wait with the client.
    for _ in range(40):
        slow.run([0] * 1000, [[0] * 250] * 1000)
    for _ in range(40):
        witness.step([1])
    assert resident_bytes(wire.server) - before < 20_000_000
    slow.cut()
    witness.step([2])


def test_the_refusals_of_a_reader_who_does_not_read_are_bounded_too(wire: Wire) -> None:
    slow, witness = wire.other(SMALL_WINDOW).stream(), Follower(wire, wire.stream())
    before = Metrics.of(wire.server)
    for _ in range(200):
        slow.run([0] * 1000, [[0]] * 1000)
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") > MAX_UNSENT_BYTES // 2)
    for _ in range(40):
        witness.step([1])
    after = Metrics.of(wire.server)
    assert after.value("cellserve_stream_unsent_bytes") < 10 * MAX_UNSENT_BYTES
    assert after.since(before, "cellserve_run_failures_total", reason="STALE_HANDLE") < 50_000
    slow.cut()
    witness.step([2])


def test_a_generate_that_is_not_read_rests(wire: Wire) -> None:
    session, witness = (Follower(wire, wire.stream(), model) for model in ("tiny-gru", "tiny-lstm"))
    call = wire.sessions.Generate(request_of(session, max_tokens=1_000_000, seed=1, logprobs=True), timeout=60)
    next(call)
    # What gRPC takes unread and what may wait for it, in messages of 16 tokens and at least 64 bytes.
    most = (65_535 + MAX_UNSENT_BYTES) // 64 * 16
    assert rested(wire, session.id, witness) < most
    call.cancel()


def resident_bytes(server: ServerProcess) -> int:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return 1024 * int(line.split()[1])
