"""Connections to a server with several front-end processes, and which process has taken each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from grpc_channelz.v1.channelz_pb2 import (
    GetServerSocketsRequest,
    GetServerSocketsResponse,
    GetServersRequest,
    GetServersResponse,
)

from tests.support.processes import children, remote_ports
from tests.support.server import ServerProcess
from tests.support.wire import Wire

__all__ = ["connections", "sockets_of", "worker_pids"]

# For each worker: of two workers, one would be left without connections once in 2**31 runs.
NUM_CONNECTIONS = 16

# The sockets that the process behind a connection has, by their two addresses.
Sockets: TypeAlias = frozenset[str]


def worker_pids(server: ServerProcess) -> list[int]:
    """The front-end processes of a server."""
    assert server.process is not None
    return children(server.process.pid)


def sockets_of(wire: Wire) -> Sockets:
    """The sockets of the front end that has taken a connection, as its channelz tells of them."""
    service = "/grpc.channelz.v1.Channelz"
    get_servers = wire.channel.unary_unary(
        f"{service}/GetServers",
        request_serializer=GetServersRequest.SerializeToString,
        response_deserializer=GetServersResponse.FromString,
    )
    get_sockets = wire.channel.unary_unary(
        f"{service}/GetServerSockets",
        request_serializer=GetServerSocketsRequest.SerializeToString,
        response_deserializer=GetServerSocketsResponse.FromString,
    )
    [server] = get_servers(GetServersRequest(), timeout=10).server
    asked = GetServerSocketsRequest(server_id=server.ref.server_id)
    return frozenset(socket.name for socket in get_sockets(asked, timeout=10).socket_ref)


@contextmanager
def connections(server: ServerProcess) -> Iterator[dict[int, list[Wire]]]:
    """Connections by the process that has taken them, the busiest first."""
    pids = worker_pids(server)
    with ExitStack() as stack:
        first = stack.enter_context(Wire(server))
        wires = [first, *(first.other() for _ in range(len(pids) * NUM_CONNECTIONS - 1))]
        for wire in wires:
            sockets_of(wire)  # connects
        ports = {pid: remote_ports(pid) for pid in pids}
        by_pid: dict[int, list[Wire]] = {pid: [] for pid in pids}
        for wire in wires:
            told = {int(name.rpartition(":")[2]) for name in sockets_of(wire)}
            [pid] = [pid for pid in pids if told <= ports[pid]]
            by_pid[pid].append(wire)
        yield dict(sorted(by_pid.items(), key=lambda item: -len(item[1])))
