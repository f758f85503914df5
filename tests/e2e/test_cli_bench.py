"""`cellserve bench` against a real server: the load is the one asked for, and what it tells is so."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from cellserve import AsyncClient, Client
from cellserve.cli.app import run
from cellserve.load import Driver, parse_mix
from tests.support.cli import Cellserve
from tests.support.metrics import Metrics
from tests.support.server import ServerProcess


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


def num_steps(server: ServerProcess, model: str, kind: str) -> float:
    return Metrics.of(server).value("cellserve_steps_total", model=model, kind=kind)


def test_without_a_rate_every_session_always_has_one_request(cellserve: Cellserve, server: ServerProcess) -> None:
    before = num_steps(server, "tiny-gru", "run")
    shown = cellserve.json("bench", "--model", "tiny-gru", "--sessions", "8", "--duration", "1")
    assert (shown["model"], shown["sessions"], shown["rate"], shown["mix"]) == ("tiny-gru", 8, None, {"step": 1})
    assert shown["num_requests"] == shown["num_tokens"] == shown["latency_seconds"]["step"]["num_requests"]
    assert shown["failures"] == {}
    # Half a second more was to warm up.
    assert 1.1 < (num_steps(server, "tiny-gru", "run") - before) / shown["num_tokens"] < 2.5
    # Little's law, with the median in the mean's place.
    latency = shown["latency_seconds"]["all"]
    assert 4 < latency["p50"] * shown["requests_per_second"] < 10
    assert latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    assert shown["send_lag_p99_seconds"] is None


def test_with_a_rate_so_many_requests_are_sent_and_no_more(cellserve: Cellserve) -> None:
    shown = cellserve.json(
        "bench", "--model", "tiny-gru", "--sessions", "16", "--rate", "300", "--duration", "2", "--seed", "3"
    )
    assert shown["rate"] == 300
    assert abs(shown["num_requests"] - 600) < 5 * 600**0.5
    assert shown["seconds"] >= 2
    assert 0 <= shown["send_lag_p99_seconds"] < 0.05


def test_a_mix_is_sent_by_its_weights_and_each_kind_counted(cellserve: Cellserve, server: ServerProcess) -> None:
    before = num_steps(server, "tiny-gru", "generate")
    mix = ["--mix", "step:2,run16:1,generate8:1", "--rate", "400"]
    shown = cellserve.json("bench", "--model", "tiny-gru", "--sessions", "16", "--duration", "2", *mix)
    numbers = {name: each["num_requests"] for name, each in shown["latency_seconds"].items()}
    assert set(numbers) == {"all", "step", "run16", "generate8"}
    assert shown["mix"] == {"step": 2, "run16": 1, "generate8": 1}
    assert numbers["all"] == shown["num_requests"]
    assert shown["num_tokens"] == numbers["step"] + 16 * numbers["run16"] + 8 * numbers["generate8"]
    assert 0.4 < numbers["step"] / numbers["all"] < 0.6
    assert num_steps(server, "tiny-gru", "generate") - before >= 8 * numbers["generate8"]


@pytest.mark.parametrize("model", ["pycode", "vectors-gru", "tiny-lstm", "headless"])
def test_any_model_can_be_loaded(cellserve: Cellserve, model: str) -> None:
    arguments = ["--model", model, "--sessions", "4", "--duration", "0.3", "--mix", "step:3,run:1"]
    assert cellserve.json("bench", *arguments)["num_requests"] > 0
    last = cellserve.text("bench", *arguments).splitlines()[-1].split()
    assert (last[0], last[2]) == ("4", "all")


def test_no_session_is_left_behind(cellserve: Cellserve, server: ServerProcess) -> None:
    cellserve.json("bench", "--model", "tiny-gru", "--duration", "0.2")
    with Client(server.target) as client:
        assert client.sessions() == []


def test_the_search_tells_the_most_sessions_with_a_latency(cellserve: Cellserve) -> None:
    arguments = ["--model", "tiny-gru", "--duration", "0.2", "--max-sessions", "64"]
    easy = cellserve.json("bench", *arguments, "--sessions", "16", "--target-p99-ms", "10000")
    assert easy["sessions_held"] == 64
    assert [(trial["sessions"], trial["met"]) for trial in easy["trials"]] == [(16, True), (32, True), (64, True)]
    hard = cellserve.json("bench", *arguments, "--sessions", "2", "--target-p99-ms", "0.001")
    assert hard["sessions_held"] is None
    assert [(trial["sessions"], trial["met"]) for trial in hard["trials"]] == [(2, False), (1, False)]
    assert "not one session" in cellserve.text("bench", *arguments, "--sessions", "1", "--target-p99-ms", "0.001")


def test_the_rate_of_a_search_grows_with_the_sessions(cellserve: Cellserve) -> None:
    arguments = ["--sessions", "8", "--rate", "80", "--max-sessions", "16", "--target-p99-ms", "10000"]
    shown = cellserve.json("bench", "--model", "tiny-gru", "--duration", "1", *arguments)
    assert [(trial["sessions"], trial["rate"]) for trial in shown["trials"]] == [(8, 80), (16, 160)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mix", "steps"], "'steps' is no part of a mix"),
        (["--mix", "generate", "--model", "vectors-gru"], "vectors-gru cannot generate"),
        (["--model", "absent"], "serves no model 'absent'"),
        (["--rate", "0"], "'--rate'"),
    ],
)
def test_misuse_is_told_in_one_line(cellserve: Cellserve, arguments: list[str], said: str) -> None:
    code, line = cellserve.refusal("bench", *arguments)
    assert code == 2
    assert said in line


def test_a_server_that_is_not_there_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--server", "127.0.0.1:1"]) == 1
    assert "no server answers at 127.0.0.1:1" in capfd.readouterr().err


async def test_latencies_on_a_schedule_contain_what_a_stalled_server_kept_waiting(server: ServerProcess) -> None:
    async with AsyncClient(server.target) as client:
        model = next(model for model in await client.models() if model.name == "tiny-gru")
        driver = Driver(client, model, parse_mix("step"))
        sessions = await driver.open_sessions(4)

        async def stall() -> None:
            assert server.process is not None
            await asyncio.sleep(0.5)
            os.kill(server.process.pid, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            os.kill(server.process.pid, signal.SIGCONT)

        stalling = asyncio.create_task(stall())
        scheduled = await driver.run(sessions, 2.0, rate=400)
        await stalling
        stalling = asyncio.create_task(stall())
        in_turn = await driver.run(sessions, 2.0)
        await stalling

    # Half of the time the server stood still, so nearly half of the requests that were due waited for more than 0.1 s.
    def late(result: Any) -> float:
        return float((result.latencies["step"] > 0.1).mean())

    assert late(scheduled) > 0.35
    # Without a schedule each session waited once, and nobody asked for the rest.
    assert (in_turn.latencies["step"] > 0.1).sum() == 4
    assert late(in_turn) < 0.02


def test_several_addresses_are_loaded_together(cellserve: Cellserve, server: ServerProcess) -> None:
    both = f"127.0.0.1:{server.port},localhost:{server.port}"  # the same server by another name
    shown = json.loads(
        cellserve.run_plain(
            "--server", both, "--json", "bench", "--model", "tiny-gru", "--sessions", "8", "--duration", "0.3"
        )
    )
    assert shown["server"] == both
    assert shown["num_requests"] > 0
    assert shown["failures"] == {}


def test_progress_is_shown_on_a_terminal_and_results_alone_on_standard_output(server: ServerProcess) -> None:
    ours, its = os.openpty()
    command = [sys.executable, "-c", "from cellserve._command import main; main()", "bench", "--server", server.target]
    arguments = ["--json", "--model", "tiny-gru", "--sessions", "4", "--duration", "1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=its, env=environment) as process:
        os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # what reading gives when the other end is closed
            while part := os.read(ours, 65536):
                shown += part
        os.close(ours)
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["num_requests"] > 0
    assert process.returncode == 0
    assert b"4 sessions" in shown
    assert re.search(rb"[1-9][\d,]* tokens/s", shown)
