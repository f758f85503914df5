"""Sessions at work while servers are killed and the network misbehaves end as they would have on a quiet day.

Real processes, a real SQLite file, a real redis-server, the client library; deterministic mode, so that the same means
the same to the last bit. `make chaos` runs it at full length.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cellserve import AsyncClient, Tls
from tests.chaos.killing import kill_in_turn
from tests.chaos.plan import CALL_TIMEOUT_SECONDS, Act, Pace, Story, differences, make_plan, run_plan
from tests.chaos.proxy import BadProxy
from tests.support.certificates import Certificates
from tests.support.models import write_tiny_model
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess

VOCAB_SIZE = 11
INTERVAL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Size:
    num_sessions: int
    num_tokens: int
    num_kills: int
    mischief: float  # of each kind, in a chunk of bytes


SIZE = Size(64, 2000, 20, 0.002) if os.environ.get("CELLSERVE_TEST_CHAOS") == "long" else Size(24, 400, 6, 0.01)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def chaos_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chaos-models")
    # A hidden size that is no multiple of 8.
    write_tiny_model(
        directory / "chaos" / "1", "gru", num_layers=2, hidden_size=20, vocab_size=VOCAB_SIZE, output_size=VOCAB_SIZE
    )
    return directory


def make_server(tmp_path: Path, models: Path, store: str, number: int = 0) -> ServerProcess:
    settings: dict[str, str | int | float | bool] = {
        "store": store,
        "deterministic": True,
        "checkpoint_interval_seconds": INTERVAL_SECONDS,
    }
    return ServerProcess(tmp_path / f"server-{number}.log", models, settings)


@pytest.fixture(scope="module")
def plan() -> list[list[Act]]:
    return make_plan(1, SIZE.num_sessions, SIZE.num_tokens, VOCAB_SIZE)


@pytest.fixture(scope="module")
def quiet(chaos_models: Path, plan: list[list[Act]], tmp_path_factory: pytest.TempPathFactory) -> list[Story]:
    """What the sessions answer and end as when nothing happens to them, on a server without a store."""

    async def run(target: str) -> list[Story]:
        async with AsyncClient(target) as client:
            return await run_plan(client, "chaos", plan, prefix="quiet")

    with make_server(tmp_path_factory.mktemp("quiet"), chaos_models, "") as server:
        return asyncio.run(run(server.target))


@asynccontextmanager
async def client_of(targets: str | Sequence[str]) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(targets, timeout_seconds=CALL_TIMEOUT_SECONDS) as client:
        yield client


async def disturbed(
    servers: Sequence[ServerProcess], plan: list[list[Act]], prefix: str, durability: str, num_kills: int
) -> list[Story]:
    """The same acts while the servers are killed in turn."""
    pace = Pace()
    targets = [server.target for server in servers]
    async with client_of(targets[0] if len(targets) == 1 else targets) as client, asyncio.TaskGroup() as tasks:
        killing = tasks.create_task(
            kill_in_turn(servers, pace, num_kills=num_kills, interval_seconds=INTERVAL_SECONDS, seed=len(prefix))
        )
        stories = await run_plan(client, "chaos", plan, prefix=prefix, durability=durability, pace=pace)
        await killing
    return stories


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, ("--appendonly", "yes", "--appendfsync", "always")) as server:
        yield server


def test_sessions_on_sqlite_end_as_undisturbed_however_often_the_server_is_killed(
    chaos_models: Path, plan: list[list[Act]], quiet: list[Story], tmp_path: Path
) -> None:
    with make_server(tmp_path, chaos_models, f"sqlite:///{tmp_path}/sessions.db") as server:
        stories = asyncio.run(disturbed([server], plan, "periodic", "periodic", SIZE.num_kills))
    assert differences(quiet, stories) == []


def test_sync_sessions_on_sqlite_end_as_undisturbed_too(
    chaos_models: Path, plan: list[list[Act]], quiet: list[Story], tmp_path: Path
) -> None:
    with make_server(tmp_path, chaos_models, f"sqlite:///{tmp_path}/sessions.db") as server:
        stories = asyncio.run(disturbed([server], plan, "sync", "sync", max(2, SIZE.num_kills // 4)))
    assert differences(quiet, stories) == []


def test_sessions_on_two_replicas_end_as_undisturbed_though_each_is_killed_in_turn(
    chaos_models: Path, plan: list[list[Act]], quiet: list[Story], tmp_path: Path, redis_server: RedisServer
) -> None:
    with (
        make_server(tmp_path, chaos_models, redis_server.url, 0) as one,
        make_server(tmp_path, chaos_models, redis_server.url, 1) as other,
    ):
        stories = asyncio.run(disturbed([one, other], plan, "fleet", "periodic", SIZE.num_kills))
    assert differences(quiet, stories) == []


async def behind_a_bad_network(
    server: ServerProcess, plan: list[list[Act]], kinds: tuple[str, ...], tls: Tls | None
) -> list[Story]:
    async with (
        BadProxy(server.port, seed=5, kinds=kinds, mischief=SIZE.mischief) as proxy,
        AsyncClient(proxy.target, tls=tls, timeout_seconds=CALL_TIMEOUT_SECONDS) as client,
    ):
        stories = await run_plan(client, "chaos", plan, prefix="proxied")
    assert sum(proxy.counts.values()) >= 5, proxy.counts
    return stories


def test_sessions_behind_a_network_that_delays_and_breaks_off_end_as_undisturbed(
    chaos_models: Path, plan: list[list[Act]], quiet: list[Story], tmp_path: Path
) -> None:
    with make_server(tmp_path, chaos_models, f"sqlite:///{tmp_path}/sessions.db") as server:
        stories = asyncio.run(behind_a_bad_network(server, plan, ("delay", "break"), None))
    assert differences(quiet, stories) == []


def test_sessions_behind_a_network_that_drops_repeats_and_cuts_bytes_end_as_undisturbed(
    chaos_models: Path, plan: list[list[Act]], quiet: list[Story], tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    server = make_server(tmp_path, chaos_models, f"sqlite:///{tmp_path}/sessions.db")
    server.settings |= {
        "tls_certificate": str(certificates.path("server.pem")),
        "tls_private_key": str(certificates.path("server.key")),
    }
    tls = Tls(root_certificates=certificates.path("authority.pem"))
    with server:
        stories = asyncio.run(behind_a_bad_network(server, plan, ("drop", "repeat", "cut", "delay", "break"), tls))
    assert differences(quiet, stories) == []


def test_a_plan_that_ends_otherwise_is_told_apart(quiet: list[Story]) -> None:
    other = [Story(list(story.answers), story.state) for story in quiet]
    other[3].answers[5] = b"something else"
    other[4].state = b""
    assert differences(quiet, other) == ["session 3, act 5: another answer", "session 4: another state"]


def test_the_plan_has_every_kind_of_act(plan: list[list[Act]]) -> None:
    kinds: dict[str, int] = defaultdict(int)
    for acts in plan:
        for act in acts:
            kinds[type(act).__name__] += 1
    assert kinds["Step"] > 50
    assert kinds["Generate"] > 10
