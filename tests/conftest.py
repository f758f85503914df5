"""Fixtures that every kind of test shares: models made on the fly, a running server, databases for state stores."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_tiny_model
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess

CELLS = ("vanilla_rnn", "leaky_rnn", "simplified_gru", "gru", "gru_reset_after", "lstm")
PYCODE = Path(__file__).parent.parent / "model" / "cellserve_model" / "models" / "pycode"


@pytest.fixture(scope="session")
def models_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pycode`, and for each cell a tiny model of tokens (vocabulary 11) and one of vectors (3 in, 2 out)."""
    directory = tmp_path_factory.mktemp("models")
    for seed, cell in enumerate(CELLS):
        tiny = "tiny-gru" if cell == "gru" else f"tiny-{cell}"
        write_tiny_model(
            directory / tiny / "1", cell, num_layers=2, hidden_size=8, vocab_size=11, output_size=11, seed=seed
        )
        write_tiny_model(
            directory / f"vectors-{cell}" / "1",
            cell,
            num_layers=2,
            hidden_size=8,
            input_size=3,
            output_size=2,
            seed=100 + seed,
        )
    write_tiny_model(directory / "headless" / "1", "gru", num_layers=1, hidden_size=8, vocab_size=11, seed=7)
    shutil.copytree(PYCODE, directory / "pycode")
    return directory


@pytest.fixture(scope="session")
def server(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A running server that tests share: each must leave it without sessions of its own and in good health."""
    log_file = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(log_file, models_directory) as process:
        yield process


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that tests share, one after the other."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty database of it."""
    redis_server.empty()
    return redis_server.url


@pytest.fixture(params=["sqlite", "redis"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/cells.db"
    url: str = request.getfixturevalue("redis_url")
    return url
