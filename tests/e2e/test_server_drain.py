"""SIGTERM: accepted work is finished and answered, nothing new is taken, all are told, and the process ends well."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.model_service_pb2 import ListModelsRequest
from tests.support.generating import fork, generate, request_of
from tests.support.health import health, watch_health
from tests.support.metrics import Metrics
from tests.support.refusals import expect, of_call
from tests.support.server import ServerProcess
from tests.support.stream import RawStream, outputs
from tests.support.wire import LONG, SMALL_WINDOW, Follower, Wire

SERVICES = ("", "cellserve.v1.SessionService", "cellserve.v1.ModelService")
MAX_UNSENT_BYTES = 65_536

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(models_directory: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with these settings; it is stopped after the test at the latest."""
    with _servers(models_directory, tmp_path) as starting:
        yield starting


@contextmanager
def _servers(models_directory: Path, folder: Path) -> Iterator[Start]:
    started: list[ServerProcess] = []

    def begin(**settings: str | int | float | bool) -> ServerProcess:
        started.append(ServerProcess(folder / "server.log", models_directory, settings))
        return started[-1].start()

    try:
        yield begin
    finally:
        for process in started:
            if process.process is not None and process.process.poll() is None:
                process.kill()


def unread_run(wire: Wire) -> tuple[RawStream, int]:
    """A run that has been accepted and cannot end before its answers are read, and its stream."""
    stream = wire.other(SMALL_WINDOW).stream()
    session = stream.open("pycode")
    requests = stream.run([session.handle] * 2, [LONG, b"bc"], outputs(states=True), positions=[0, len(LONG)])
    Metrics.wait(wire.server, lambda found: found.value("cellserve_stream_unsent_bytes") > MAX_UNSENT_BYTES // 2)
    return stream, requests[0]


def test_a_draining_server_finishes_what_it_took_and_takes_no_more(start: Start) -> None:
    server = start(max_stream_unsent_bytes=MAX_UNSENT_BYTES)
    with Wire(server) as wire:
        stream = wire.stream()
        session = Follower(wire, stream)
        session.step([1, 2])
        watching = watch_health(wire.channel, SERVICES[1])
        assert next(watching) == "SERVING"
        reader, request = unread_run(wire)
        server.terminate()
        assert stream.drain_notice() == 30_000
        assert next(watching) == "NOT_SERVING"
        watching.close()
        assert {health(wire.channel, service) for service in SERVICES} == {"NOT_SERVING"}

        # Nothing new is taken, by any way in.
        expect(session.refuse([3]), "DRAINING")
        command, [opening] = stream.opening("tiny-gru")
        stream.send(command)
        expect(stream.refusal(opening), "DRAINING")
        late = wire.stream()
        command, [opening] = late.opening("tiny-gru")
        late.send(command)
        expect(late.refusal(opening), "DRAINING")
        with wire.unmoved(session.id):
            expect(of_call(lambda: wire.step(session.id, [3])), "DRAINING")
            expect(of_call(lambda: wire.sessions.Generate(request_of(session))), "DRAINING")
            expect(of_call(lambda: wire.open("tiny-gru")), "DRAINING")
            expect(of_call(lambda: wire.open("tiny-gru", [session.id], "ATTACH")), "DRAINING")
            expect(of_call(lambda: wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id))), "DRAINING")

        # What was taken can be taken away, and is finished.
        assert wire.models.ListModels(ListModelsRequest()).models
        session.check()
        answer = reader.answer(request)
        expected = wire.trace("pycode", LONG).states
        np.testing.assert_allclose(answer.outputs["states"], expected, rtol=0, atol=2e-5)
        assert reader.answer(request + 1).position == len(LONG) + 2
        for one in (reader, stream, late):
            expect(one.ending(), "DRAINING")
        assert server.wait() == 0
    assert "Traceback" not in server.log


def test_a_reader_who_takes_its_time_gets_all_answers_of_a_draining_server(start: Start) -> None:
    server = start(max_answer_bytes=65_536)
    with Wire(server) as wire:
        stream, other = wire.other(SMALL_WINDOW).stream(), wire.stream()
        session = stream.open("pycode")
        [request] = stream.run([session.handle], [LONG], outputs(states=True))
        Metrics.wait(wire.server, lambda found: found.total("cellserve_steps_total") == len(LONG))
        server.terminate()
        other.drain_notice()
        while not stream.is_answered(request):
            stream.read()
            time.sleep(0.05)  # a slow line: three seconds in all
        assert stream.answer(request).num_tokens == len(LONG)
        expect(stream.ending(), "DRAINING")
        assert server.wait() == 0


def test_a_generate_under_way_is_finished(start: Start) -> None:
    server = start()
    with Wire(server) as wire:
        session = Follower(wire, wire.stream())
        session.step([1, 2, 3])
        expected = generate(fork(session), seed=1, max_tokens=3000).tokens
        call = wire.sessions.Generate(request_of(session, seed=1, max_tokens=3000), timeout=60)
        tokens = list(next(call).tokens)
        server.terminate()
        for message in call:
            tokens += message.tokens
        assert tokens == expected
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_server_with_nothing_to_do_ends_at_once(start: Start, number: signal.Signals) -> None:
    server = start()
    with Wire(server) as wire:
        sessions = [Follower(wire, wire.stream()) for _ in range(3)]
        for session in sessions:
            session.step([1])
        begun_at = time.monotonic()
        assert server.process is not None
        server.process.send_signal(number)
        for session in sessions:
            expect(session.stream.ending(), "DRAINING")
        assert server.wait() == 0
        assert time.monotonic() - begun_at < 5
    assert "Traceback" not in server.log


def test_a_drain_does_not_outlast_its_timeout(start: Start) -> None:
    server = start(max_stream_unsent_bytes=MAX_UNSENT_BYTES, drain_timeout_seconds=1)
    with Wire(server) as wire:
        stream = wire.stream()
        reader, _ = unread_run(wire)
        begun_at = time.monotonic()
        server.terminate()
        assert stream.drain_notice() == 1000
        assert server.wait() == 0
        assert 0.9 < time.monotonic() - begun_at < 6
        assert reader.end() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
