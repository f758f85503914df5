"""What an open session takes of a server's memory: README's bound, held against a real process."""

from pathlib import Path

import numpy as np
import pytest

from bench.raw_stream import RawStream
from bench.samples import resident_bytes
from tests.support.models import write_tiny_model
from tests.support.server import ServerProcess

# Two numbers of many, so that what any server takes once it has worked for a while is left out.
NUM_FEW = 40_000
NUM_MANY = 160_000
HIDDEN_SIZE = 128
MAX_BYTES = 400  # beside the state of 4 H


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "models" / "tiny" / "1", "gru", hidden_size=HIDDEN_SIZE, vocab_size=8, output_size=8)
    return tmp_path / "models"


def _resident_with(log: Path, models: Path, num_sessions: int) -> int:
    """Bytes of a server's memory with so many sessions, and no room for more, each of which has run twice."""
    settings: dict[str, str | int | float | bool] = {"max_sessions": num_sessions, "max_slots": num_sessions}
    with ServerProcess(log, models, settings) as server, RawStream(server.target) as stream:
        assert server.process is not None
        opened = [stream.open("tiny", 1000) for _ in range(num_sessions // 1000)]
        for position in (0, 1):
            for handles in opened:
                stream.send_runs(handles, np.ones(1000, np.int64), np.full(1000, position))
                stream.read_answers()
        return resident_bytes(server.process.pid)


def test_an_open_session_takes_no_more_than_its_state_and_400_bytes(models: Path, tmp_path: Path) -> None:
    few = _resident_with(tmp_path / "few.log", models, NUM_FEW)
    many = _resident_with(tmp_path / "many.log", models, NUM_MANY)
    assert (many - few) / (NUM_MANY - NUM_FEW) <= 4 * HIDDEN_SIZE + MAX_BYTES
