"""The addresses behind what a user names as the target of a client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Final

from cellserve.errors import Unavailable

__all__ = ["Addresses"]

_DNS_PREFIX: Final = "dns:///"


class Addresses:
    """One target of gRPC; several "host:port"; or "dns:///name:port", all the addresses that the name has.

    name: the target as it was given, several joined by commas. authority: the name that every address goes by, or None
    where each has its own. can_change: whether to resolve again can give other addresses.
    """

    def __init__(self, target: str | Sequence[str]) -> None:
        targets = (target,) if isinstance(target, str) else tuple(target)
        if not targets or not all(targets) or len(set(targets)) != len(targets):
            raise ValueError("a client has at least one target, and all are different")
        self.name = ",".join(targets)
        self.can_change = isinstance(target, str) and target.startswith(_DNS_PREFIX)
        self.authority = self.name.removeprefix(_DNS_PREFIX) if self.can_change else None
        self._targets = targets

    async def resolve(self) -> Sequence[str]:
        """The targets to connect to, in a stable order. Raises Unavailable where the name has no address now."""
        if self.authority is None:
            return self._targets
        host, separator, port = self.authority.rpartition(":")
        if not separator:
            host, port = self.authority, "443"
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unavailable(f"{host} cannot be resolved: {error}") from None
        return sorted({_target(str(address[0]), int(address[1])) for *_, address in found})


def _target(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
