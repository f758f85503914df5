"""A hundred thousand stored sessions: they cost a start nothing, and each is attached in no time."""

import asyncio
import time
from dataclasses import replace

import numpy as np

from cellserve_service.stores import open_store
from cellserve_service.stores.operations import Load, Loaded, Row, Save, Written
from cellserve_service.stores.rows import decode_session, encode_session
from tests.support.replicas import MODEL, Replica, StartReplica

NUM_SESSIONS = 100_000
NUM_ATTACHES = 400
BATCH = 10_000


async def store_many(url: str, session_id: str) -> None:
    """Store copies of a session that is stored already, under ids of their own."""
    store = open_store(url, replica=1, ended_memory_seconds=600)
    await store.open()
    try:
        [loaded] = await store.apply([Load(session_id)], now=time.time())
        assert isinstance(loaded, Loaded)
        assert loaded.row is not None
        session = decode_session(session_id, "", loaded.row.blob)
        for first in range(0, NUM_SESSIONS, BATCH):
            rows: list[Row] = [
                replace(loaded.row, session_id=name, blob=encode_session(name, session))
                for name in (f"s-{number}" for number in range(first, first + BATCH))
            ]
            written = await store.apply([Save(row) for row in rows], now=time.time())
            assert written == [Written.WRITTEN] * BATCH
    finally:
        await store.close()


def start_seconds(replica: Replica) -> float:
    """From the process, whose imports are done, to SERVING; the best of three."""
    seconds = []
    for _ in range(3):
        replica.kill()
        begun_at = time.monotonic()
        replica.start()
        seconds.append(time.monotonic() - begun_at)
    return min(seconds)


def test_a_hundred_thousand_stored_sessions(start_replica: StartReplica, store_url: str) -> None:
    replica = start_replica()
    session = replica.session("template")
    session.step([1, 2, 3])
    replica.stream.done(replica.stream.detach(session.handle))
    asyncio.run(store_many(store_url, "template"))
    with_sessions, without_store = start_seconds(replica), start_seconds(start_replica(store=""))
    assert with_sessions - without_store < 3
    # In truth it is nothing at all.
    assert with_sessions < 3
    random = np.random.default_rng(5)
    seconds = []
    for number in random.permutation(NUM_SESSIONS)[:NUM_ATTACHES].tolist():
        begun_at = time.monotonic()
        opened = replica.stream.open(MODEL, f"s-{number}", "ATTACH")
        seconds.append(time.monotonic() - begun_at)
        assert opened.position == 3
    assert np.quantile(seconds, 0.99) < 0.020
    assert replica.wire.state(f"s-{number}") == replica.quiet_state([1, 2, 3])
