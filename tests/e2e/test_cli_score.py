"""`cellserve score` against the real server, beside log-probabilities asked for one file at a time."""

import math
from pathlib import Path

import pytest

from cellserve import Client
from cellserve.cli.surprise import bits_of, most_surprising_lines
from tests.support.cli import Cellserve
from tests.support.server import ServerProcess

CONTENTS = {
    "plain.py": b"import os\n\n\ndef main():\n    print(os.getcwd())\n" * 4,
    "strange.py": b"import os\nimport sys\nxq = '~@#zzqj^^'\nimport re\n",
    "long.py": b"# a line that stands many times\n" * 200,
    "empty.py": b"",
}


@pytest.fixture
def cellserve(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> Cellserve:
    return Cellserve(server, capfd)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name) for name in CONTENTS]


def test_scores_are_those_of_each_file_alone(cellserve: Cellserve, server: ServerProcess, files: list[str]) -> None:
    scores = cellserve.json_lines("score", "--model", "pycode", "--lines", "2", *files)
    assert [score["file"] for score in scores] == files
    with Client(server.target) as client:
        for score, content in zip(scores[:3], CONTENTS.values(), strict=False):
            with client.session("pycode") as session:
                result = session.step(content, next_token=False, logprobs=True)
            assert result.logprobs is not None
            bits = bits_of(result.logprobs)
            assert score["num_bytes"] == len(content)
            assert math.isclose(score["bits_per_byte"], bits.mean(), rel_tol=1e-5)
            expected = most_surprising_lines(content, bits, max_lines=2)
            assert [line["number"] for line in score["lines"]] == [line.number for line in expected]
    assert scores[3]["bits_per_byte"] is None
    assert scores[3]["lines"] == []


def test_the_strange_line_of_a_file_is_found(cellserve: Cellserve, files: list[str]) -> None:
    text = cellserve.text("score", "--model", "pycode", "--lines", "1", files[1])
    assert f"{files[1]}:3: " in text
    assert "zzqj" in text


def test_scoring_leaves_no_session_behind(cellserve: Cellserve, server: ServerProcess, files: list[str]) -> None:
    cellserve.text("score", "--model", "pycode", *files)
    with Client(server.target) as client:
        assert client.sessions() == []
