"""What can go wrong in a subcommand, as one line and an exit code; and the client whose errors become such lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from cellserve import AsyncClient, Client, Tls
from cellserve.errors import (
    CellserveError,
    ConnectionLost,
    Draining,
    ResourceExhausted,
    SessionBusy,
    SessionExists,
    SessionLost,
    SessionNotFound,
    TimedOut,
    Unavailable,
)

__all__ = ["CommandError", "MisuseError", "RefusalError", "async_client", "sync_client"]


class CommandError(Exception):
    """One line that says what was wrong and what to do."""

    exit_code = 1


class MisuseError(CommandError):
    """The command was called with something that cannot work."""

    exit_code = 2


class RefusalError(CommandError):
    """The server refused, or does not answer."""


# The first kind that fits counts.
_HINTS: Final = (
    (SessionNotFound, "see `cellserve sessions` for those that are open"),
    (SessionLost, "open it again, or another"),
    (SessionExists, "choose another id, or its model with --model"),
    (SessionBusy, "wait until its generate has ended"),
    (Draining, "wait until it has started again, or name another with --server"),
    (ConnectionLost, "is it still running? the same command can be repeated"),
    (TimedOut, "see `cellserve top` for how busy it is"),
    (ResourceExhausted, "try again later"),
)


@contextmanager
def sync_client(server: str, tls: bool | Tls) -> Iterator[Client]:
    """A client of a server that answers, or of several with commas between. Raises RefusalError."""
    with _refusals(server), Client(_addresses(server), tls=tls) as client:
        client.ping()  # whoever types a command is not to wait until a server comes
        yield client


@asynccontextmanager
async def async_client(server: str, tls: bool | Tls) -> AsyncIterator[AsyncClient]:
    """A client of a server that answers, or of several with commas between. Raises RefusalError."""
    with _refusals(server):
        async with AsyncClient(_addresses(server), tls=tls) as client:
            await client.ping()
            yield client


def _addresses(server: str) -> str | list[str]:
    addresses = [address.strip() for address in server.split(",")]
    return addresses if len(addresses) > 1 else server


@contextmanager
def _refusals(server: str) -> Iterator[None]:
    try:
        yield
    except CellserveError as error:
        raise RefusalError(_one_line(error, server)) from error


def _one_line(error: CellserveError, server: str) -> str:
    if type(error) is Unavailable and error.reason is None:
        return f"no server answers at {server}: start one with `cellserve-server`, or name another with --server"
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, ResourceExhausted) and error.retry_after_seconds:
        return f"{server}: {said}; try again in {error.retry_after_seconds:g} s"
    hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), None)
    return f"{server}: {said}" + (f"; {hint}" if hint else "")
