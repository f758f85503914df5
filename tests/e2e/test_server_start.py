"""Starting the server: settings from everywhere, impossible ones refused in one line, broken models, taken ports."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cellserve.v1.model_service_pb2 import ListModelsRequest
from tests.support.health import health
from tests.support.models import write_tiny_model
from tests.support.server import ServerProcess, free_port
from tests.support.wire import Follower, Wire


def refused(*arguments: str | Path, **environment: str) -> str:
    """What the command says on its one line before it ends with status 2."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("CELLSERVE_")}
    command = [sys.executable, "-m", "cellserve_service", "--metrics-listen", "127.0.0.1:0", *map(str, arguments)]
    if "--listen" not in arguments:
        command += ["--listen", "127.0.0.1:0"]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("cellserve-server: ")
    assert len(line) < 300
    return line


IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--nonsense", "1"], "nonsense"),
    "unknown argument": (["extra"], "extra"),
    "no number": (["--max-sessions", "many"], "max_sessions"),
    "too small": (["--max-sessions", "0"], "max_sessions"),
    "negative time": (["--idle-timeout-seconds", "-1"], "idle_timeout_seconds"),
    "no address": (["--listen", "nowhere"], "HOST:PORT"),
    "no port": (["--listen", "127.0.0.1:99999"], "65535"),
    "beyond loopback without TLS": (["--listen", "0.0.0.0:0"], "allow_insecure"),
    "no such store": (["--store", "redis://localhost"], "store"),
    "no such device": (["--device", "tpu"], "device"),
    "bits of rounded weights": (["--deterministic", "--weights", "bfloat16"], "deterministic"),
    "no such weights": (["--weights", "int4"], "weights"),
    "half of TLS": (["--tls-certificate", "chain.pem"], "tls_private_key"),
    "TLS files that are not there": (["--tls-certificate", "a.pem", "--tls-private-key", "b.pem"], "b.pem"),
    "limits that contradict each other": (["--max-run-tokens", "9000"], "max_session_pending_tokens"),
    "no such file": (["--config", "not/there.toml"], "there.toml"),
}


@pytest.mark.parametrize(("arguments", "named"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_setting_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "named"),
    [("nonsense = 1", "nonsense"), ("max_sessions = [", "TOML"), ("max_sessions = -1", "max_sessions")],
)
def test_an_impossible_configuration_file_is_refused_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "cellserve.toml").write_text(text)
    assert named in refused("--config", tmp_path / "cellserve.toml")


def test_an_impossible_environment_is_refused_in_one_line() -> None:
    assert "max_sessions" in refused(CELLSERVE_MAX_SESSIONS="-1")


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    # The one that counts is the one that is complained of.
    configuration = tmp_path / "cellserve.toml"
    configuration.write_text("max_sessions = -1")
    assert "greater than or equal to 1" in refused("--config", configuration)
    assert "unable to parse" in refused("--config", configuration, CELLSERVE_MAX_SESSIONS="from the environment")
    said = refused("--config", configuration, "--max-sessions", "0.5", CELLSERVE_MAX_SESSIONS="3")
    assert "max_sessions" in said
    assert "integer" in said


def test_a_configuration_file_is_read(tmp_path: Path, one_model: Path) -> None:
    (tmp_path / "cellserve.toml").write_text("max_run_tokens = 30\nmax_answer_bytes = 3000\n")
    server = ServerProcess(tmp_path / "server.log", one_model)
    server.settings = {"config": str(tmp_path / "cellserve.toml"), "max_run_tokens": 10}
    with server, Wire(server) as wire:
        limits = wire.models.ListModels(ListModelsRequest()).limits
        assert (limits.max_run_tokens, limits.max_answer_bytes) == (10, 3000)


@pytest.fixture(scope="module")
def one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one-model")
    write_tiny_model(directory / "tiny-gru" / "1", "gru", vocab_size=11, output_size=11)
    return directory


@pytest.fixture(scope="module")
def server(one_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("start") / "server.log", one_model) as process:
        yield process


def test_the_server_says_what_it_serves_where_and_on_which_device(server: ServerProcess) -> None:
    said = server.log
    for fact in (server.target, server.metrics_url, "tiny-gru version 1", "hidden size 8", "on cpu", "insecure"):
        assert fact in said
    assert len(said.splitlines()) < 8


def test_a_second_server_on_the_port_fails_and_the_first_goes_on(server: ServerProcess, one_model: Path) -> None:
    said = refused("--listen", server.target, "--models", one_model)
    assert server.target in said
    assert "in use" in said
    with Wire(server) as wire:
        Follower(wire, wire.stream()).step([1, 2])


def test_a_metrics_port_that_is_taken_is_told(one_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "metrics" in refused("--models", one_model, "--metrics-listen", address)


def test_an_address_that_is_not_this_machines_is_told(one_model: Path) -> None:
    assert "192.0.2.1" in refused("--models", one_model, "--listen", f"192.0.2.1:{free_port()}", "--allow-insecure")


def without_configuration(version: Path) -> None:
    (version / "config.json").unlink()


def with_weights_cut_off(version: Path) -> None:
    weights = version / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_a_tensor_of_another_shape(version: Path) -> None:
    tensors = load_file(version / "model.safetensors")
    tensors["layers.0.input_weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, version / "model.safetensors")


def with_an_unknown_cell(version: Path) -> None:
    config = json.loads((version / "config.json").read_text())
    (version / "config.json").write_text(json.dumps(config | {"cell": "transformer"}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_configuration, "config.json"),
        (with_weights_cut_off, "model.safetensors"),
        (with_a_tensor_of_another_shape, "layers.0.input_weight"),
        (with_an_unknown_cell, "transformer"),
    ],
)
def test_a_broken_model_is_told_in_one_line(
    one_model: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    shutil.copytree(one_model, tmp_path / "models")
    damage(tmp_path / "models" / "tiny-gru" / "1")
    said = refused("--models", tmp_path / "models")
    assert named in said
    assert str(tmp_path) in said


def test_a_models_directory_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    assert "not-there" in refused("--models", tmp_path / "not-there")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--models", tmp_path / "empty")


def test_a_device_that_is_not_there_is_told(one_model: Path) -> None:
    assert "cuda:7" in refused("--models", one_model, "--device", "cuda:7")


def test_a_server_beyond_loopback_is_reached_when_allowed(one_model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "server.log", one_model)
    server.settings = {"listen": f"0.0.0.0:{server.port}", "allow_insecure": True, "log_format": "json"}
    with server, Wire(server) as wire:
        assert health(wire.channel, "") == "SERVING"
        last = json.loads(server.log.splitlines()[-1])
        assert (last["event"], last["level"]) == ("serving", "info")


def test_help_names_every_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cellserve_service", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for flag in ("--listen", "--models", "--max-sessions", "--idle-timeout-seconds", "--drain-timeout-seconds"):
        assert flag in done.stdout
