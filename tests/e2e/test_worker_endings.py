"""Front-end processes that die, an engine that dies before them, and a server with several of them that drains."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession
from cellserve.v1 import session_service_pb2 as pb
from tests.support import failing_server
from tests.support.failing_server import FATAL_TOKEN
from tests.support.forking import ForkedServer, Forker
from tests.support.health import health, watch_health
from tests.support.metrics import Metrics
from tests.support.processes import wait_until_gone
from tests.support.refusals import expect, of_call
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.wire import LONG, SMALL_WINDOW, Follower, Wire, step_request
from tests.support.workers import connections, sockets_of, worker_pids

MODEL = "tiny-gru"

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(forker: Forker, tiny_models_directory: Path, models_directory: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with two workers and further settings; at the end nothing of it may be left."""
    started: list[tuple[ServerProcess, list[int]]] = []

    def begin(*, models: Path = tiny_models_directory, **settings: str | int | float | bool) -> ServerProcess:
        server = ForkedServer(tmp_path / "server.log", models, {"workers": 2, **settings}, forker=forker)
        server.start()
        started.append((server, worker_pids(server)))
        assert len(started[-1][1]) == 2
        return server

    yield begin
    for server, pids in started:
        if server.process is not None and server.process.poll() is None:
            server.kill()
        wait_until_gone(pids)
        # gRPC tells of a call that it has to cancel by one of its own.
        assert "Traceback" not in server.log or "drain_timed_out" in server.log, server.log


def wait_for(server: ServerProcess, event: str, number: int = 1) -> None:
    """Wait until the server has logged an event so many times."""
    deadline = time.monotonic() + 20
    while len(re.findall(rf"\b{event}\b", server.log)) < number:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


# A worker that dies.


def runs_of(seed: int, number: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 11, size=int(random.integers(1, 6))).tolist() for _ in range(number)]


def num_tokens(seed: int, num_runs: int) -> int:
    return sum(map(len, runs_of(seed, num_runs)))


async def follow(session: AsyncSession, seed: int, num_steps: int) -> list[bytes]:
    """Every answer to some runs, as bytes."""
    answers = []
    for tokens in runs_of(seed, num_steps):
        result = await session.step(tokens, states=True, logprobs=True)
        assert result.states is not None
        assert result.logprobs is not None
        answers.append(result.states.tobytes() + result.logprobs.tobytes())
    return answers


async def test_clients_notice_nothing_of_workers_that_are_killed(start: Start) -> None:
    server = start(deterministic=True)
    async with AsyncClient(server.target) as quiet:
        expected = [await follow(await quiet.open_session(MODEL), seed, 60) for seed in range(4)]
    clients = [AsyncClient(server.target, timeout_seconds=60) for _ in range(8)]
    sessions = [await client.open_session(MODEL) for client in clients for _ in range(3)]
    seeds = [number % 4 for number in range(len(sessions))]
    work = [asyncio.create_task(follow(session, seed, 60)) for session, seed in zip(sessions, seeds, strict=True)]
    for number in range(3):
        await asyncio.sleep(0.1)
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        await asyncio.to_thread(wait_for, server, "worker_started", number + 1)
    for seed, answers in zip(seeds, await asyncio.gather(*work), strict=True):
        assert answers == expected[seed]
    for session in sessions:
        await session.close()
    for client in clients:
        await client.close()
    assert len(worker_pids(server)) == 2
    metrics = Metrics.of(server)
    assert metrics.value("cellserve_sessions_opened_total", model=MODEL) == 4 + len(sessions)
    # Every token is consumed once, however often it was sent.
    total = sum(num_tokens(seed, 60) for seed in [*range(4), *seeds])
    assert metrics.value("cellserve_steps_total", model=MODEL, kind="run") == total


def test_a_dead_workers_streams_have_ended_and_its_work_is_withdrawn(start: Start, models_directory: Path) -> None:
    server = start(models=models_directory)
    with connections(server) as groups:
        (pid, [ours, *_]), (_, [other, *_]) = groups.items()
        bystander = Follower(other, other.stream())
        bystander.step([1, 2])
        stream = ours.stream()
        opened = stream.open("pycode")
        session = Follower(ours, stream)
        session.step([1])
        positions = [0, len(LONG)]
        running, queued = stream.run(
            [opened.handle] * 2, [LONG, b"ab"], outputs("every", next_token=True), positions=positions
        )
        stream.begun(running)
        generating = Follower(ours, stream)
        generating.step([1])
        call = ours.sessions.Generate(pb.GenerateRequest(session_id=generating.id, max_tokens=10**5), timeout=60)
        next(call)
        os.kill(pid, signal.SIGKILL)
        wait_for(server, "worker_died")
        assert of_call(lambda: next(call)).code == "UNAVAILABLE"
        assert not stream.is_answered(queued)

        def settled(session_id: str) -> bool:
            found = other.sessions.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=10).session
            return not (found.attached or found.generating or found.num_pending_tokens)

        for session_id in (opened.session_id, session.id, generating.id):
            while not settled(session_id):
                pass
        # What had begun has run, what had not is withdrawn, and what was idle is as it was.
        assert other.state(opened.session_id).position == len(LONG)
        session.wire, session.stream = other, other.stream()
        session.attach(session.stream.open(MODEL, session.id, "ATTACH"))
        session.step([2])
        session.check()
        bystander.step([3])
        bystander.check()
        wait_for(server, "worker_started")
        assert Metrics.of(server).value("cellserve_streams") == 2


def test_an_answer_that_a_dead_worker_took_along_is_given_again_to_the_same_request(start: Start) -> None:
    server = start()
    with connections(server) as groups:
        (pid, [ours, *_]), (_, [other, *_]) = groups.items()
        session = Follower(ours, ours.stream())
        session.step([1, 2])
        request = pb.ForkSessionRequest(session_id=session.id, request_id="fork-1")
        forked = ours.sessions.ForkSession(request)
        os.kill(pid, signal.SIGKILL)
        wait_for(server, "worker_died")
        assert other.sessions.ForkSession(request) == forked


def test_counters_do_not_go_back_when_a_worker_dies(start: Start) -> None:
    server = start()
    with connections(server) as groups:
        for [wire, *_] in groups.values():
            session = Follower(wire, wire.stream())
            session.step([1, 2])
        before = Metrics.of(server)
        os.kill(next(iter(groups)), signal.SIGKILL)
        wait_for(server, "worker_started")
        after = Metrics.of(server)
        for name in ("cellserve_step_duration_seconds_count", "grpc_server_started_total", "cellserve_steps_total"):
            assert after.total(name) >= before.total(name) > 0, name
        assert (before.value("cellserve_streams"), after.value("cellserve_streams")) == (2, 1)


def test_a_worker_that_stands_still_holds_up_nobody_else_and_loses_nothing(
    start: Start, models_directory: Path
) -> None:
    server = start(models=models_directory, max_stream_unsent_bytes=2**28)
    with connections(server) as groups:
        (pid, [ours, *_]), (_, [other, *_]) = groups.items()
        stream = ours.stream()
        sessions = stream.open_many("pycode", 16)
        os.kill(pid, signal.SIGSTOP)
        try:
            bystander = Follower(other, other.stream())
            bystander.step([1, 2])
        finally:
            os.kill(pid, signal.SIGCONT)
        # 64 MB of answers, far more than may wait between the processes.
        requests = stream.run([session.handle for session in sessions], [LONG] * 16, outputs(states=True))
        stream.begun(requests[0])
        os.kill(pid, signal.SIGSTOP)
        try:
            steps = "cellserve_steps_total"
            last = -1.0
            while (now := Metrics.of(server).value(steps, model="pycode", kind="run")) != last:
                last = now
            assert last < 16 * len(LONG)
            for token in range(20):
                bystander.step([token % 11])
        finally:
            os.kill(pid, signal.SIGCONT)
        expected = ours.trace("pycode", LONG).states
        for request in requests:
            np.testing.assert_allclose(stream.answer(request).outputs["states"], expected, rtol=0, atol=2e-5)


# The engine's process ends.


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "with a worker that stands still"])
def test_no_worker_outlives_the_engine(start: Start, stopped: bool) -> None:
    server = start()
    with connections(server) as groups:
        pids = list(groups)
        [[wire, *_], [other, *_]] = groups.values()
        session = Follower(wire, wire.stream())
        session.step([1])
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
        server.kill()
        if stopped:
            os.kill(pids[1], signal.SIGCONT)
        wait_until_gone(pids)
        assert session.stream.end() is grpc.StatusCode.UNAVAILABLE
        assert of_call(lambda: other.step("nobody", [1])).code == "UNAVAILABLE"
    server.start()  # the address is free
    with Wire(server) as wire:
        Follower(wire, wire.stream()).step([1])
    assert server.stop() == 0


class FailingServer(ServerProcess):
    """The server whose device fails at one token."""

    @property
    def arguments(self) -> list[str]:
        python, _, _, *flags = super().arguments
        return [python, str(Path(failing_server.__file__)), *flags]


def test_a_fault_of_the_device_is_told_over_every_worker(tiny_models_directory: Path, tmp_path: Path) -> None:
    server = FailingServer(tmp_path / "server.log", tiny_models_directory, {"workers": 2})
    with server, connections(server) as groups:
        pids = list(groups)
        followers = [Follower(wires[0], wires[0].stream()) for wires in groups.values()]
        for follower in followers:
            follower.step([1])
        watching = [watch_health(wires[0].channel, "") for wires in groups.values()]
        assert [next(watch) for watch in watching] == ["SERVING"] * 2
        request = step_request(followers[0].id, [FATAL_TOKEN])
        refused = of_call(lambda: followers[0].wire.sessions.Step(request, timeout=30))
        assert (refused.code, refused.reason) == ("INTERNAL", "ENGINE_FAILED")
        for follower in followers:
            ending = follower.stream.ending()
            assert (ending.code, ending.reason) == ("INTERNAL", "ENGINE_FAILED")
        assert [next(watch) for watch in watching] == ["NOT_SERVING"] * 2
        assert server.wait() == 1
        wait_until_gone(pids)


# Drain.


def test_all_workers_drain(start: Start, models_directory: Path) -> None:
    server = start(models=models_directory, max_stream_unsent_bytes=65_536)
    with connections(server) as groups:
        wires = [wires[0] for wires in groups.values()]
        sessions = [Follower(wire, wire.stream()) for wire in wires]
        for session in sessions:
            session.step([1, 2])
        slow = wires[0].other(SMALL_WINDOW).stream()
        handle = slow.open("pycode").handle
        [request] = slow.run([handle], [LONG], outputs(states=True))
        slow.begun(request)
        server.terminate()
        for session in sessions:
            assert session.stream.drain_notice() == 30_000
        for wires_of_one in groups.values():
            assert health(wires_of_one[1].channel, "") == "NOT_SERVING"
        for session in sessions:
            expect(session.refuse([3]), "DRAINING")
            session.check()
        assert slow.answer(request).num_tokens == len(LONG)
        for stream in (slow, *(session.stream for session in sessions)):
            expect(stream.ending(), "DRAINING")
        assert server.wait() == 0
    assert "worker_died" not in server.log


def test_a_worker_that_dies_while_the_server_drains_is_not_replaced(start: Start, models_directory: Path) -> None:
    server = start(models=models_directory, max_stream_unsent_bytes=65_536)
    with connections(server) as groups:
        (_, [wire, *_]), (pid, [other, *_]) = groups.items()
        slow = wire.other(SMALL_WINDOW)
        while sockets_of(slow) != sockets_of(wire):
            slow = wire.other(SMALL_WINDOW)
        stream, lost = slow.stream(), other.stream()
        lost.open(MODEL)
        [request] = stream.run([stream.open("pycode").handle], [LONG], outputs(states=True))
        stream.begun(request)
        server.terminate()
        lost.drain_notice()
        os.kill(pid, signal.SIGKILL)
        wait_for(server, "worker_died")
        assert stream.answer(request).num_tokens == len(LONG)
        expect(stream.ending(), "DRAINING")
        assert server.wait() == 0
    assert "worker_started" not in server.log
    assert "drain_timed_out" not in server.log


def test_a_drain_of_workers_does_not_outlast_its_timeout(start: Start, models_directory: Path) -> None:
    server = start(models=models_directory, max_stream_unsent_bytes=65_536, drain_timeout_seconds=1)
    with Wire(server) as wire:
        stream = wire.other(SMALL_WINDOW).stream()
        handle = stream.open("pycode").handle
        [request] = stream.run([handle], [LONG], outputs(states=True))
        stream.begun(request)
        begun_at = time.monotonic()
        server.terminate()
        assert server.wait() == 0
        assert 0.9 < time.monotonic() - begun_at < 6
    assert "drain_timed_out" in server.log


def test_a_signal_to_the_whole_group_drains_as_well(start: Start) -> None:
    server = start()
    with Wire(server) as wire:
        session = Follower(wire, wire.stream())
        session.step([1])
        assert server.process is not None
        for pid in (*worker_pids(server), server.process.pid):  # as a terminal does at Ctrl-C
            os.kill(pid, signal.SIGINT)
        expect(session.stream.ending(), "DRAINING")
        assert server.wait() == 0
    assert "worker_died" not in server.log


# The address.


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_second_server_on_the_port_fails_and_the_first_goes_on(start: Start, num_workers: int) -> None:
    server = start()
    command = [sys.executable, "-m", "cellserve_service", "--listen", server.target, "--workers", str(num_workers)]
    refused = subprocess.run(
        [*command, "--metrics-listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"cellserve-server: cannot listen on {server.target}: the address is in use")
    with Wire(server) as wire:
        Follower(wire, wire.stream()).step([1, 2])


def test_workers_serve_on_a_port_that_is_free(start: Start) -> None:
    server = start(listen="127.0.0.1:0")
    [port] = re.findall(r"cellserve-server on 127\.0\.0\.1:(\d+) ", server.log)
    server.port = int(port)
    with connections(server) as groups:
        assert all(groups.values())
