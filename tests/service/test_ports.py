"""An address that several processes of one server share, and nobody else."""

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from cellserve_service.errors import StartError
from cellserve_service.ports import Reservation


def listener(port: int, *, shares: bool, host: str = "127.0.0.1") -> socket.socket:
    """A socket that listens, as gRPC's do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
        found.bind((host, port))
        found.listen()
    except OSError:
        found.close()
        raise
    return found


@pytest.fixture
def reservation() -> Iterator[Reservation]:
    with closing(Reservation("127.0.0.1:0")) as reserved:
        yield reserved


def test_a_reserved_address_takes_no_connections_by_itself(reservation: Reservation) -> None:
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", reservation.port), 5):
        pass


@pytest.mark.parametrize("num_listeners", [0, 1, 2])
def test_an_address_is_shared_by_those_that_say_so_and_reserved_once(
    reservation: Reservation, num_listeners: int
) -> None:
    listeners = [listener(reservation.port, shares=True) for _ in range(num_listeners)]
    with pytest.raises(OSError, match="in use"):
        listener(reservation.port, shares=False)
    with pytest.raises(StartError, match="in use"):
        Reservation(reservation.address, wait_seconds=0.0)
    for one in listeners:
        one.close()


def test_connections_reach_all_that_share_an_address(reservation: Reservation) -> None:
    listeners = [listener(reservation.port, shares=True) for _ in range(2)]
    connections = [socket.create_connection(("127.0.0.1", reservation.port), 5) for _ in range(40)]
    taken = [0, 0]
    for number, one in enumerate(listeners):
        one.setblocking(False)
        while True:
            try:
                connections.append(one.accept()[0])
                taken[number] += 1
            except BlockingIOError:
                break
    assert sum(taken) == 40
    assert all(taken)
    for one in (*connections, *listeners):
        one.close()


@pytest.mark.parametrize("shares", [True, False])
def test_an_address_where_anybody_listens_cannot_be_reserved(shares: bool) -> None:
    with listener(0, shares=shares) as taken:
        port: int = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}"):
            Reservation(f"127.0.0.1:{port}", wait_seconds=0.0)
        with pytest.raises(StartError, match="in use"):
            Reservation(f"0.0.0.0:{port}", wait_seconds=0.0)


def test_an_address_is_free_again_although_connections_linger(reservation: Reservation) -> None:
    with (
        listener(reservation.port, shares=True) as one,
        socket.create_connection(("127.0.0.1", reservation.port), 5) as client,
    ):
        server, _ = one.accept()
        server.close()  # the end that closes first keeps the port for a minute
        assert client.recv(1) == b""
    reservation.close()
    with closing(Reservation(reservation.address, wait_seconds=0.0)) as again:
        assert again.port == reservation.port


def test_every_address_is_reserved_for_both_families() -> None:
    with closing(Reservation("0.0.0.0:0")) as reserved:
        for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            with pytest.raises(OSError, match="in use"):
                listener(reserved.port, shares=False, host=host)


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no-such-host.invalid:0"])
def test_an_address_that_is_not_this_machines_is_told(address: str) -> None:
    with pytest.raises(StartError, match=address):
        Reservation(address)
