"""`cellserve step` and `cellserve generate` against the real server, beside what the library answers."""

import io
import sys

import numpy as np
import pytest

from cellserve import Client
from tests.support.cli import Cellserve
from tests.support.server import ServerProcess

TEXT = "import nump"


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


def test_a_step_of_text_gives_in_json_what_the_library_gives(cellserve: Cellserve, server: ServerProcess) -> None:
    shown = cellserve.json("step", "--model", "pycode", "--text", TEXT, "--top-k", "3", "--logprobs")
    with Client(server.target) as client, client.session("pycode") as session:
        result = session.step(TEXT.encode(), top_k=3, logprobs=True)
    assert result.next_token is not None
    assert result.top_tokens is not None
    assert result.logprobs is not None
    assert shown["position"] == len(TEXT)
    assert shown["next_token"] == result.next_token.tolist()
    assert shown["top_tokens"] == result.top_tokens.tolist()
    np.testing.assert_allclose(shown["logprobs"], result.logprobs, rtol=1e-5)


def test_a_step_without_json_shows_a_line_for_each_token(cellserve: Cellserve) -> None:
    lines = cellserve.text("step", "--model", "pycode", "--text", TEXT, "--top-k", "2", "--logprobs").splitlines()
    assert len(lines) == 1 + len(TEXT) + 1
    assert lines[1].split()[:2] == ["1", "'i'"]
    assert lines[-2].split()[:2] == [str(len(TEXT)), "'p'"]
    assert "%" in lines[1]
    assert lines[-1] == f"a passing session of pycode, now at position {len(TEXT)}"


def test_a_named_session_is_kept_and_goes_on_where_it_stood(cellserve: Cellserve, server: ServerProcess) -> None:
    for _ in range(2):
        shown = cellserve.json("step", "--model", "tiny-gru", "--session", "kept", "1", "2", "3")
    assert shown["position"] == 6
    assert shown["session"] == "kept"
    with Client(server.target) as client:
        client.open_session("tiny-gru", id="kept", keep=False, mode="attach")


def test_a_passing_session_is_closed(cellserve: Cellserve, server: ServerProcess) -> None:
    cellserve.json("step", "--model", "tiny-gru", "1")
    with Client(server.target) as client:
        assert client.sessions() == []


def test_vectors_are_given_one_an_argument(cellserve: Cellserve, server: ServerProcess) -> None:
    shown = cellserve.json("step", "--model", "vectors-gru", "--states", "--", "0.5,1,2", "-1,0,1e-3")
    with Client(server.target) as client, client.session("vectors-gru") as session:
        result = session.step(np.array([[0.5, 1, 2], [-1, 0, 1e-3]]), states=True)
    assert result.outputs is not None
    assert result.states is not None
    np.testing.assert_allclose(shown["outputs"], result.outputs, rtol=1e-5)
    np.testing.assert_allclose(shown["states"], result.states, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "position"),
    [("pycode", b"def \xff", 5), ("tiny-gru", b"1 2\n3\n", 3), ("vectors-gru", b"0,1,2\n3,4,5\n", 2)],
)
def test_without_tokens_standard_input_is_read_as_the_model_takes_it(
    cellserve: Cellserve, monkeypatch: pytest.MonkeyPatch, model: str, given: bytes, position: int
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert cellserve.json("step", "--model", model, "--at", "none")["position"] == position


def test_only_the_last_token_is_shown_where_that_is_asked_for(cellserve: Cellserve) -> None:
    assert len(cellserve.json("step", "--model", "tiny-gru", "--at", "last", "1", "2", "3")["next_token"]) == 1
    lines = cellserve.text("step", "--model", "tiny-gru", "--at", "last", "1", "2", "3").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["position", "3"]


def test_generate_writes_the_text_that_the_library_samples(cellserve: Cellserve, server: ServerProcess) -> None:
    options = ["--model", "pycode", "--prompt", TEXT, "--max-tokens", "40", "--temperature", "0.7", "--seed", "7"]
    with Client(server.target) as client, client.session("pycode") as session:
        session.step(TEXT.encode(), at="none")
        expected = bytes(session.generate(max_tokens=40, temperature=0.7, seed=7))
    assert cellserve.text("generate", *options) == expected.decode(errors="replace") + "\n"
    shown = cellserve.json("generate", *options)
    assert bytes(shown["tokens"]) == expected
    assert shown["text"] == expected.decode(errors="replace")
    assert (shown["position"], shown["seed"], shown["finish_reason"]) == (len(TEXT) + 40, 7, "length")


def test_generate_ends_after_a_stop_token(cellserve: Cellserve, server: ServerProcess) -> None:
    with Client(server.target) as client, client.session("pycode") as session:
        session.step(TEXT.encode(), at="none")
        sampled = list(session.generate(max_tokens=40, temperature=0.0))
    stop = sampled[20]
    shown = cellserve.json("generate", "--model", "pycode", "--prompt", TEXT, "--temperature", "0", "--stop", str(stop))
    assert shown["tokens"] == sampled[: sampled.index(stop) + 1]
    assert shown["finish_reason"] == "stop"


def test_generate_writes_ids_where_tokens_are_no_bytes(cellserve: Cellserve) -> None:
    output = cellserve.text("generate", "--model", "tiny-gru", "--prompt", "1 2", "--max-tokens", "5")
    assert len([int(token) for token in output.split()]) == 5
