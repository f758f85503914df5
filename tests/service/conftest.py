"""Replicas that share a database."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cellserve_service.stores import open_store
from cellserve_service.stores.operations import StateStore

__all__ = ["ENDED_MEMORY_SECONDS", "OpenReplica"]

ENDED_MEMORY_SECONDS = 600.0

OpenReplica = Callable[[int], Awaitable[StateStore]]


@pytest.fixture
async def open_replica(store_url: str) -> AsyncIterator[OpenReplica]:
    """Opens a store on the database for a server of the given mark."""
    stores: list[StateStore] = []

    async def open_one(replica: int) -> StateStore:
        store = open_store(store_url, replica=replica, ended_memory_seconds=ENDED_MEMORY_SECONDS)
        await store.open()
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        await store.close()
