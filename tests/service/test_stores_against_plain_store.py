"""Random batches of two replicas, on both stores: every outcome is that of a plain dict."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from cellserve_service.stores import open_store
from cellserve_service.stores.operations import (
    Claim,
    ClaimAll,
    ClaimMode,
    End,
    ListRows,
    Load,
    Operation,
    Row,
    Save,
)
from tests.service.plain_store import PlainStore
from tests.service.profiles import QUICK
from tests.support.redis_server import RedisServer

START = 1_700_000_000.25
MEMORY_SECONDS = 600.0
REPLICAS = (7, 2**64 - 1)

times = st.sampled_from([-700.0, -600.0, -1.0, 0.0, 0.1, 10.0, 400.0, 1000.0])
ids = st.sampled_from(["a", "B", "b:c"])
models = st.sampled_from(["gru", "lstm"])
holders = st.sampled_from([0, 5, 2**63, 2**64 - 1])
small = st.integers(0, 4)


@st.composite
def rows(draw: st.DrawFn, now: float, session_id: str | None = None) -> Row:
    return Row(
        session_id=session_id or draw(ids),
        model=draw(models),
        epoch=draw(small),
        position=draw(small),
        holder=draw(holders),
        expires_at=now + draw(times),
        request_id=draw(st.sampled_from(["", "r1"])),
        blob=draw(st.sampled_from([b"", b"\x00\xff", b"state" * 100])),
        checkpoints=draw(st.sampled_from([None, b"", b"marks"])),
    )


@st.composite
def claims(draw: st.DrawFn, now: float) -> Claim:
    session_id = draw(ids)
    return Claim(
        session_id=session_id,
        model=draw(st.none() | models),
        mode=draw(st.sampled_from(ClaimMode)),
        holder=draw(st.none() | holders),
        epoch=draw(small),
        is_resident=draw(st.booleans()),
        created=draw(st.none() | rows(now, session_id)),
        token=draw(st.sampled_from([1, 2**63 - 1])),  # so few that some repeat an earlier claim
    )


@st.composite
def ends(draw: st.DrawFn, now: float) -> End:
    return End(
        session_id=draw(ids),
        reason=draw(st.sampled_from([3, 5])),
        request_id=draw(st.sampled_from(["", "r1"])),
        position=draw(small),
        forget_at=now + draw(times),
    )


def operations(now: float) -> st.SearchStrategy[Operation]:
    all_or_none = st.lists(claims(now), max_size=3, unique_by=lambda claim: claim.session_id).map(ClaimAll)
    listing = st.builds(ListRows, st.sampled_from(["", "gru", "lstm"]), st.just("") | ids, st.integers(1, 3))
    return st.one_of(
        rows(now).map(Save),
        rows(now).map(Save),
        claims(now),
        claims(now),
        all_or_none,
        ends(now),
        ids.map(Load),
        listing,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, float, list[Operation]]]:
    """Batches: whose, when, and what."""
    now, batches = START, []
    for _ in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([0.0, 0.1, 5.0, 300.0]))
        batches.append((draw(st.sampled_from(REPLICAS)), now, draw(st.lists(operations(now), min_size=1, max_size=6))))
    return batches


async def check(url: str, history: list[tuple[int, float, list[Operation]]]) -> None:
    plain = PlainStore(MEMORY_SECONDS)
    stores = {mark: open_store(url, replica=mark, ended_memory_seconds=MEMORY_SECONDS) for mark in REPLICAS}
    for store in stores.values():
        await store.open()
    try:
        for replica, now, batch in history:
            assert await stores[replica].apply(batch, now=now) == plain.apply(replica, batch, now=now)
    finally:
        for store in stores.values():
            await store.close()


@pytest.fixture(params=["sqlite", "redis"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes an empty database for each example; returns its URL."""
    numbers = iter(range(1_000_000))

    def new_file() -> str:
        return f"sqlite:///{tmp_path}/{next(numbers)}.db"

    def empty_redis() -> str:
        server: RedisServer = request.getfixturevalue("redis_server")
        with Redis.from_url(server.url) as client:
            client.flushall()
        return server.url

    return new_file if request.param == "sqlite" else empty_redis


@settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories())
def test_every_outcome_is_that_of_a_plain_dict(
    new_database: Callable[[], str], history: list[tuple[int, float, list[Operation]]]
) -> None:
    asyncio.run(check(new_database(), history))
