"""Fixtures of the tests over a real channel: a connection, a stream, and sessions that the oracle follows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.followed import SETTINGS
from tests.support.forking import ForkedServer, Forker
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.server import ServerProcess
from tests.support.stream import RawStream
from tests.support.unseen import write_unseen_models
from tests.support.wire import Follower, Wire

Settings = dict[str, str | int | float | bool]


@pytest.fixture(scope="session")
def expiring_server(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Sessions expire after a second, and are forgotten another one later."""
    settings: dict[str, str | int | float | bool] = {"idle_timeout_seconds": 1, "ended_session_memory_seconds": 1}
    log_file = tmp_path_factory.mktemp("expiring") / "server.log"
    with ServerProcess(log_file, models_directory, settings) as process:
        yield process


@pytest.fixture(scope="session")
def small_server(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Every limit is so small that a test reaches it."""
    settings: dict[str, str | int | float | bool] = {
        "max_sessions": 14,
        "max_slots": 3,
        "max_held_answers": 4,
        "max_held_answer_bytes": 2048,
        "max_run_tokens": 64,
        "max_session_pending_tokens": 100,
        "max_pending_tokens": 250,
        "max_message_bytes": 20_000,
        "max_answer_bytes": 4096,
        "max_stream_unsent_bytes": 65_536,
    }
    log_file = tmp_path_factory.mktemp("small") / "server.log"
    with ServerProcess(log_file, models_directory, settings) as process:
        yield process


@pytest.fixture(scope="session")
def unseen_models_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unseen_models(tmp_path_factory.mktemp("unseen-models"))


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Wire]:
    """A connection to the module's server; what the test opens there is closed after it."""
    with Wire(server) as connection:
        yield connection


@pytest.fixture
def stream(wire: Wire) -> RawStream:
    return wire.stream()


@pytest.fixture
def session(wire: Wire, stream: RawStream) -> Iterator[Follower]:
    """A session that has consumed three tokens; after the test it must still go on from where it stood."""
    session = Follower(wire, stream)
    session.step([1, 2, 3])
    yield session
    session.step([4])


@pytest.fixture
def witnesses(wire: Wire, stream: RawStream) -> Iterator[list[Follower]]:
    """Sessions on the same stream and on another one, which must notice nothing of what the test does."""
    witnesses = [Follower(wire, stream), Follower(wire, wire.stream(), "tiny-lstm")]
    for number, witness in enumerate(witnesses):
        witness.step([5, number])
    yield witnesses
    for witness in witnesses:
        witness.step([6, 7])
        witness.check()
        assert witness.handle not in witness.stream.lost_handles


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Forks servers, which start in no time."""
    with Forker() as process:
        yield process


@pytest.fixture(scope="session")
def tiny_models_directory(models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that take no time to load."""
    directory = tmp_path_factory.mktemp("tiny-models")
    for name in (MODEL, "tiny-lstm"):
        (directory / name).symlink_to(models_directory / name)
    return directory


@pytest.fixture(scope="session")
def storing_server(
    forker: Forker, tiny_models_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with a store, for tests that cancel calls."""
    folder = tmp_path_factory.mktemp("storing")
    settings = {**SETTINGS, "store": f"sqlite:///{folder}/cells.db"}
    with ForkedServer(folder / "server.log", tiny_models_directory, settings, forker=forker) as process:
        yield process
    assert "Traceback" not in process.log, process.log


@pytest.fixture
def start_replica(
    forker: Forker, tiny_models_directory: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[StartReplica]:
    """Starts servers on the database of `store_url`, or without one; they are killed after the test at the latest."""
    store = request.getfixturevalue("store_url") if "store_url" in request.fixturenames else ""
    usual: Settings = {"store": store, "deterministic": True, "checkpoint_interval_seconds": 0.1}
    started: list[Replica] = []

    def start(**settings: str | int | float | bool) -> Replica:
        log_file = tmp_path / f"server-{len(started)}.log"
        server = ForkedServer(log_file, tiny_models_directory, usual | settings, forker=forker)
        started.append(Replica(server))
        return started[-1].start()

    yield start
    for replica in started:
        if replica.server.process is not None and replica.server.process.poll() is None:
            replica.kill()
    for replica in started:
        assert "Traceback" not in replica.server.log, replica.server.log


@pytest.fixture
def replica(start_replica: StartReplica) -> Replica:
    """A server on the database of `store_url`."""
    return start_replica()
