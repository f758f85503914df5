"""`cellserve models` and `cellserve sessions` against the real server, beside what the library says."""

import json

import pytest

from cellserve import Client
from cellserve.errors import SessionEvicted
from tests.support.cli import Cellserve
from tests.support.server import ServerProcess


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


def test_models_are_listed_in_json_as_the_library_lists_them(cellserve: Cellserve, server: ServerProcess) -> None:
    listed = cellserve.json("models")
    with Client(server.target) as client:
        served = client.models()
    assert [model["name"] for model in listed] == [model.name for model in served]
    for shown, model in zip(listed, served, strict=True):
        assert bytes.fromhex(shown["fingerprint"]) == model.fingerprint
        assert (shown["cell"], shown["vocab_size"], shown["input_size"]) == (
            model.cell,
            model.vocab_size,
            model.input_size,
        )


def test_models_are_listed_as_a_table_where_nobody_asks_for_json(cellserve: Cellserve) -> None:
    lines = cellserve.text("models").splitlines()
    pycode = next(line for line in lines if line.startswith("pycode "))
    assert pycode.split()[1:5] == ["1", "gru", "1", "512"]
    assert not any("\x1b" in line for line in lines)


def test_sessions_are_listed_with_model_and_position(cellserve: Cellserve, server: ServerProcess) -> None:
    with Client(server.target) as client, client.session("tiny-gru", id="listed-1", keep=False) as session:
        session.step([1, 2, 3])
        with client.session("tiny-lstm", id="listed-2", keep=False):
            both = {each["id"]: each for each in cellserve.json("sessions")}
            of_one_model = cellserve.json("sessions", "--model", "tiny-lstm")
            table = cellserve.text("sessions")
    assert both["listed-1"]["position"] == 3
    assert both["listed-1"]["tier"] == "device"
    assert both["listed-2"]["model"] == "tiny-lstm"
    assert [each["id"] for each in of_one_model] == ["listed-2"]
    assert "listed-1" in table
    assert "tiny-gru/1" in table


def test_sessions_beyond_the_limit_are_counted_not_shown(cellserve: Cellserve, server: ServerProcess) -> None:
    with Client(server.target) as client:
        client.open_sessions("tiny-gru", [f"many-{number}" for number in range(5)], keep=False)
        assert len(cellserve.json("sessions", "--model", "tiny-gru", "--limit", "2")) == 2
        assert "and 3 more" in cellserve.text("sessions", "--model", "tiny-gru", "--limit", "2")


def test_the_common_options_may_stand_before_the_subcommand(cellserve: Cellserve, server: ServerProcess) -> None:
    output = cellserve.run_plain("--server", server.target, "--json", "models")
    assert "pycode" in [model["name"] for model in json.loads(output)]


def test_the_server_may_be_named_by_the_environment(
    cellserve: Cellserve, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLSERVE_SERVER", server.target)
    assert "pycode" in cellserve.run_plain("models")


def test_an_operator_ends_sessions_and_their_holders_are_told(cellserve: Cellserve, server: ServerProcess) -> None:
    with Client(server.target) as client:
        first = client.open_session("tiny-gru", id="evicted-1")
        second = client.open_session("tiny-gru", id="evicted-2")
        first.step([1, 2, 3])
        assert cellserve.json("evict", "evicted-1") == {"evicted-1": 3}
        assert cellserve.text("evict", "evicted-2") == "evicted-2 ended at position 0\n"
        for session in (first, second):
            with pytest.raises(SessionEvicted):
                session.step([1])
        with pytest.raises(SessionEvicted):
            client.open_session("tiny-gru", id="evicted-1", mode="attach")
        assert not {"evicted-1", "evicted-2"} & {session.id for session in client.sessions()}
