"""Where sessions outlive a server: a file of one machine, or a Redis that several share."""

from pathlib import Path

from cellserve_service.stores.operations import StateStore

__all__ = ["open_store"]


def open_store(url: str, *, replica: int, ended_memory_seconds: float) -> StateStore:
    """The store that a URL names; it connects when it is opened. `replica` is this process's mark, of 64 bits.

    sqlite:///cells.db is a file of the working directory, sqlite:////var/lib/cells.db one anywhere; redis://, rediss://
    (TLS) and unix:// name a Redis as redis-py does. Raises ValueError for any other.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite":
        from cellserve_service.stores.sqlite import SqliteStore

        return SqliteStore(_file(rest), replica=replica, ended_memory_seconds=ended_memory_seconds)
    if separator and scheme in ("redis", "rediss", "unix"):
        # Only those who keep sessions in Redis need its client, and wait for it to load.
        from cellserve_service.stores.redis import RedisStore

        try:
            return RedisStore(url, replica=replica, ended_memory_seconds=ended_memory_seconds)
        except (ValueError, TypeError):  # which may quote a part of the password
            raise ValueError("store: this is no URL of a Redis; redis://localhost:6379/0 is one") from None
    raise ValueError(
        "store: a URL begins with sqlite:///, redis://, rediss:// or unix://; sqlite:///cells.db is one of a file"
    )


def _file(rest: str) -> Path:
    """What follows sqlite://, an empty host and a path."""
    if not rest.startswith("/") or rest.endswith("/") or any(mark in rest for mark in "?#"):
        raise ValueError(
            "store: a SQLite URL is sqlite:/// and the path of a file, without options: "
            "sqlite:///cells.db, or sqlite:////var/lib/cells.db"
        )
    if rest == "/:memory:":
        raise ValueError("store: sqlite:///:memory: keeps nothing; leave the store empty for that")
    return Path(rest[1:])
