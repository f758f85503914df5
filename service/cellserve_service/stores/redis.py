"""Keeps rows in Redis: for servers of several machines."""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cellserve_service.stores.operations import Operation, Outcome, StateStore, StoreError
from cellserve_service.stores.redis_script import SCRIPT, Argument, script_arguments, script_outcomes

__all__ = ["RedisStore"]

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 2.0
RECONNECT_SECONDS = 0.5
WATCH_PING_SECONDS = 5.0
FORGET_INTERVAL_SECONDS = 1.0
FORGET_ROWS = 500  # of a model in a batch: answers wait for it

SCHEMA_VERSION = "1"

_DIGEST = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # by which Redis knows the script

# The first that fits.
_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "refuses the user or the password"),
    (BusyLoadingError, "is still loading its data"),
    (NoPermissionError, "does not allow this user what the store needs"),
    (OutOfMemoryError, "is out of memory: raise its maxmemory"),
    (ReadOnlyError, "is a read-only replica: name the primary"),
    (RedisTimeoutError, f"did not answer within {ANSWER_SECONDS:g} s"),
    (RedisConnectionError, "cannot be reached"),
    (OSError, "cannot be reached"),
)


class RedisStore(StateStore):
    """Rows in Redis, a hash for each. A batch is one call of one script, so it is atomic, and one round trip."""

    def __init__(self, url: str, *, replica: int, ended_memory_seconds: float) -> None:
        self.warnings: list[str] = []
        self._replica = replica
        self._ended_memory_seconds = ended_memory_seconds
        # No retries: a batch may be sent again under another number only, see the script.
        self._client = Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        # Connects to nothing, and raises for options there are not.
        self._client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._writer = secrets.token_hex(8)
        self._num_batches = 0
        self._forgot_at: float | None = None

    async def open(self) -> None:
        """Connect, and look how durable this Redis is. Raises StoreError."""
        try:
            await self._execute("SET", "cellserve:version", SCHEMA_VERSION, "NX")
            version = (await self._execute("GET", "cellserve:version") or b"").decode()
            self.warnings = await self._find_warnings()
        except (RedisError, OSError) as error:
            raise _store_error(error) from error
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"Redis holds sessions of schema version {version}, this server writes version {SCHEMA_VERSION}: "
                "name another database, or run the server that made them"
            )

    async def apply(self, operations: Sequence[Operation], *, now: float) -> list[Outcome]:
        """Do the operations in one call. Raises StoreError."""
        self._num_batches += 1
        forgets = self._forgot_at is None or abs(now - self._forgot_at) >= FORGET_INTERVAL_SECONDS
        arguments: list[Argument] = [self._writer, self._num_batches, self._replica]
        arguments += (repr(now), repr(now - self._ended_memory_seconds), FORGET_ROWS if forgets else 0)
        arguments += script_arguments(operations)
        try:
            answers = await self._call(arguments)
        except (RedisError, OSError) as error:
            raise _store_error(error) from error
        if forgets:
            self._forgot_at = now
        return script_outcomes(operations, answers)

    async def watch(self, moved: Callable[[str, int], None]) -> None:
        """Tell of sessions that other replicas take; subscribes again after a lost connection."""
        while True:
            with contextlib.suppress(RedisError, OSError):
                async for session_id, epoch in self._taken():
                    moved(session_id, epoch)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()

    async def _call(self, arguments: Sequence[Argument]) -> Any:
        try:
            return await self._execute("EVALSHA", _DIGEST, 0, *arguments)
        except NoScriptError:  # of a server that is new, and has done nothing
            return await self._execute("EVAL", SCRIPT, 0, *arguments)

    async def _execute(self, *command: Argument) -> Any:
        # redis-py would pack thousands of arguments in Python, at the cost of all else that a save takes here.
        packed: Any = pack_command
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(packed(command))
            return await connection.read_response()
        finally:
            await pool.release(connection)

    async def _taken(self) -> AsyncGenerator[tuple[str, int], None]:
        """Ids and new epochs of sessions that are taken, over one connection. Raises when it is lost."""
        async with self._client.pubsub() as subscription:
            await subscription.subscribe(f"cellserve:moved:{self._replica}")
            is_asked = False
            while True:
                message = await subscription.get_message(timeout=WATCH_PING_SECONDS)
                if message is not None:
                    is_asked = False
                    if message["type"] == "message":
                        epoch, _, session_id = message["data"].decode().partition(" ")
                        yield session_id, int(epoch)
                elif is_asked:
                    raise RedisTimeoutError
                else:  # is there nothing to tell, or nobody any more?
                    await subscription.ping()
                    is_asked = True

    async def _find_warnings(self) -> list[str]:
        try:
            settings = await self._client.config_get("append*")
            settings |= await self._client.config_get("maxmemory*")
        except ResponseError:
            return ["Redis does not tell its settings: see that it has appendonly yes and appendfsync always"]
        warnings = []
        appendonly, appendfsync = settings.get("appendonly"), settings.get("appendfsync")
        if appendonly != "yes":
            warnings.append(
                "Redis has appendonly no, and loses sessions when it stops: set appendonly yes and appendfsync always"
            )
        elif appendfsync != "always":
            warnings.append(
                f"Redis has appendfsync {appendfsync}, and may lose what it took last when its machine stops: "
                "set appendfsync always"
            )
        policy = settings.get("maxmemory-policy")
        if settings.get("maxmemory") != "0" and policy != "noeviction":
            warnings.append(
                f"Redis has maxmemory-policy {policy}, and deletes sessions when memory runs short: set noeviction"
            )
        return warnings


def _store_error(error: RedisError | OSError) -> StoreError:
    for kind, cause in _CAUSES:
        if isinstance(error, kind):
            return StoreError(f"Redis {cause}")
    text = str(error)
    if text.startswith("MISCONF"):
        return StoreError("Redis cannot write to its disk")
    return StoreError(f"Redis refuses: {text[:120]}")
