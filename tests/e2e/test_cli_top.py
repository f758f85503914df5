"""`cellserve top` against the metrics of a server that is working."""

import threading

import pytest

from cellserve import Client
from tests.support.cli import Cellserve
from tests.support.server import ServerProcess


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


def test_top_counts_the_sessions_and_steps_of_a_working_server(cellserve: Cellserve, server: ServerProcess) -> None:
    done = threading.Event()
    started = threading.Event()

    def work() -> None:
        with Client(server.target) as client:
            sessions = client.open_sessions("tiny-gru", 8)
            while not done.is_set():
                client.step_many(sessions, [1] * len(sessions))
                started.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert started.wait(30)
        view = cellserve.json("top", "--once", "--interval", "0.5", "--model", "tiny-gru")
        text = cellserve.text("top", "--once", "--interval", "0.2")
    finally:
        done.set()
        worker.join()
    assert view["sessions_by_tier"]["device"] == 8
    assert view["tokens_per_second"] > 8
    assert view["num_streams"] >= 1
    assert 1 <= view["mean_batch_size"] <= 8
    assert 0 < view["step_p50_seconds"] <= view["step_p99_seconds"] < 30
    assert view["num_steps_total"] > 8
    for row in ("sessions", "tokens/s", "step latency"):
        assert row in text


def test_top_of_an_idle_server_has_no_latencies(cellserve: Cellserve) -> None:
    view = cellserve.json("top", "--once", "--interval", "0.1", "--model", "headless")
    assert view["tokens_per_second"] == 0
    assert view["step_p50_seconds"] is None
    assert view["mean_batch_size"] is None


def test_an_endpoint_of_something_else_is_refused(cellserve: Cellserve, server: ServerProcess) -> None:
    code, line = cellserve.refusal("top", "--once", "--model", "nothing")
    assert code == 1
    assert "no model 'nothing'" in line
