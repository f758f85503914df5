"""What the `cellserve` command says when something is wrong: one line on standard error, and an exit code."""

from pathlib import Path

import pytest

from cellserve import Client
from cellserve.cli.app import run
from tests.support.cli import Cellserve
from tests.support.server import ServerProcess, free_port

MISUSED, REFUSED = 2, 1


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step", "--text", "x"], "name a model with --model"),
        (["step", "--model", "absent", "1"], "serves no model 'absent'; it serves: "),
        (["step", "--model", "tiny-gru", "--text", "x"], "needs a model whose tokens are the 256 bytes"),
        (["step", "--model", "pycode", "--text", "x", "1"], "not both"),
        (["step", "--model", "tiny-gru", "x"], "'x' is no token id"),
        (["step", "--model", "tiny-gru", "99999999999999999999"], "is no token id"),
        (["step", "--model", "vectors-gru", "1,2"], "has 2 numbers; a vector of vectors-gru has 3"),
        (["step", "--model", "vectors-gru", "1,2,x"], "is no vector"),
        (["step", "--model", "pycode", "--text", ""], "no token was given"),
        (["step", "--model", "tiny-gru", "--top-k", "many", "1"], "'--top-k'"),
        (["generate", "--model", "tiny-gru", "--prompt", "a b"], "'a' is no token id"),
        (["score", "--model", "tiny-gru", __file__], "score needs a model whose tokens are the 256 bytes"),
        (["score", "--model", "pycode", "/no/such/file"], "/no/such/file"),
        (["models", "--frobnicate"], "--frobnicate"),
    ],
)
def test_misuse_says_what_was_wrong_and_exits_with_two(cellserve: Cellserve, arguments: list[str], said: str) -> None:
    code, line = cellserve.refusal(*arguments)
    assert code == MISUSED
    assert line.startswith("cellserve: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step", "--model", "tiny-gru", "11"], "not in [0, 11)"),
        (["step", "--model", "vectors-gru", "0,nan,0"], "not finite"),
        (["step", "--model", "tiny-gru", "--session", "no spaces!", "1"], "session"),
        (["step", "--model", "headless", "--top-k", "2", "1"], ""),
        (["generate", "--model", "vectors-gru"], ""),
    ],
)
def test_what_the_server_refuses_exits_with_one(cellserve: Cellserve, arguments: list[str], said: str) -> None:
    code, line = cellserve.refusal(*arguments)
    assert code == REFUSED
    assert line.startswith(f"cellserve: {cellserve.server.target}: ")
    assert said in line


def test_a_session_of_another_model_is_refused_with_what_to_do(cellserve: Cellserve, server: ServerProcess) -> None:
    with Client(server.target) as client, client.session("tiny-gru", id="taken", keep=False):
        code, line = cellserve.refusal("step", "--model", "tiny-lstm", "--session", "taken", "1")
    assert code == REFUSED
    assert "tiny-gru" in line
    assert "--model" in line


@pytest.mark.parametrize("command", [["models"], ["sessions"], ["step", "1"], ["generate"], ["score", __file__]])
def test_where_no_server_answers_the_line_says_how_to_start_one(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    target = f"127.0.0.1:{free_port()}"
    assert run([*command, "--server", target]) == REFUSED
    captured = capfd.readouterr()
    assert captured.err.splitlines() == [
        f"cellserve: no server answers at {target}: start one with `cellserve-server`, or name another with --server"
    ]


def test_where_no_metrics_are_the_line_names_their_address(capfd: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/metrics"
    assert run(["top", "--once", "--metrics-url", url]) == REFUSED
    (line,) = capfd.readouterr().err.splitlines()
    assert url in line


def test_an_unreadable_file_is_named(cellserve: Cellserve, tmp_path: Path) -> None:
    code, line = cellserve.refusal("score", "--model", "pycode", str(tmp_path))
    assert code == MISUSED
    assert str(tmp_path) in line
