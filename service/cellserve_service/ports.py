"""Reserves the address that several processes of one server listen on together.

Linux lets sockets share a port that all carry SO_REUSEPORT, and spreads connections over them. A server's workers may;
a second server must not.
"""

import errno
import socket
import time

from cellserve_service.errors import StartError

# The workers of a server that has crashed are gone within a moment, and its successor may come sooner.
WAIT_SECONDS = 2.0
PAUSE_SECONDS = 0.05


def cannot_listen(address: str) -> StartError:
    return StartError(
        f"cannot listen on {address}: the address is in use or not this machine's; choose another with --listen"
    )


class Reservation:
    """An address that is ours as long as this lives: HOST:PORT, port 0 for any that is free. Raises StartError.

    Processes of ours can listen there with SO_REUSEPORT; nobody can without, nor reserve it.
    """

    def __init__(self, address: str, *, wait_seconds: float = WAIT_SECONDS) -> None:
        host, _, port = address.rpartition(":")
        give_up_at = time.monotonic() + wait_seconds
        while True:
            try:
                self._sockets = _reserve(host.strip("[]"), int(port) or _free_port(host.strip("[]")))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                    raise cannot_listen(address) from error
                time.sleep(PAUSE_SECONDS)
        self.port: int = self._sockets[0].getsockname()[1]
        self.address = f"{host}:{self.port}"

    def close(self) -> None:
        """Give the address up."""
        for reserved in self._sockets:
            reserved.close()


def _places(host: str) -> list[tuple[int, str]]:
    """Families and addresses of a host. gRPC listens for both families on any wildcard."""
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():  # noqa: S104 - compared, not bound
        return [(socket.AF_INET6, "::")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(place[0])) for family, _, _, _, place in found))


def _free_port(host: str) -> int:
    family, place = _places(host)[0]
    with socket.socket(family) as probe:
        probe.bind((place, 0))
        port: int = probe.getsockname()[1]
        return port


def _reserve(host: str, port: int) -> list[socket.socket]:
    reserved: list[socket.socket] = []
    missing: OSError | None = None
    for family, place in _places(host):
        try:
            reserved.append(_reserve_one(family, place, port))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            missing = error
    if missing is not None and not reserved:
        raise missing
    return reserved


def _reserve_one(family: int, place: str, port: int) -> socket.socket:
    ours = socket.socket(family)
    try:
        if family == socket.AF_INET6:
            ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place != "::")
        # Connections of an earlier server that still linger are no obstacle: for `bind` because of this option, ...
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind((place, port))
        # ... and `listen` looks whether anybody else listens, as nobody shares with a socket without SO_REUSEPORT.
        ours.listen(1)
        # From now on only those with SO_REUSEPORT can bind here; and this socket takes no connections from them.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ours.shutdown(socket.SHUT_RD)
    except BaseException:
        ours.close()
        raise
    return ours
