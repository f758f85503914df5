"""The proxies of deploy/ before two real servers, for clients that have only gRPC and the metadata `cellserve-session`.

The servers have no state store, so each knows only the sessions that reached it: where a session is, is where its
calls went.
"""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from cellserve.v1.session_service_pb2 import (
    GenerateRequest,
    ListSessionsRequest,
    OpenSessionsRequest,
    StepRequest,
    TokenColumn,
)
from cellserve.v1.session_service_pb2_grpc import SessionServiceStub
from cellserve.v1.stream_pb2 import Command, OpenCommand, OpenMode, RunCommand, StreamRequest, StreamResponse
from cellserve_service.health_check import check
from tests.support.models import write_tiny_model
from tests.support.proxies import PROXIES, Proxy, ProxyProcess
from tests.support.server import ServerProcess, free_port

MODEL = "tiny-gru"
# More than every default that is known: 100 streams (HAProxy), 1024 requests (Envoy's circuit breakers).
MANY = 1200
NOTICE_SECONDS = 8.0

Fleet = dict[str, ServerProcess]
T = TypeVar("T")
pytestmark = pytest.mark.parametrize("proxy", PROXIES, ids=lambda proxy: proxy.program, scope="module")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    models, logs = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("replicas")
    write_tiny_model(models / MODEL / "1", "gru", hidden_size=8, vocab_size=11, output_size=11)
    servers = {name: ServerProcess(logs / name, models) for name in ("server-a", "server-b")}
    yield servers
    for server in servers.values():
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture
def replicas(servers: Fleet) -> Fleet:
    """Both servers, running; those that the test before has stopped are started again, knowing no session."""
    stopped = [server for server in servers.values() if server.process is None or server.process.poll() is not None]
    with ThreadPoolExecutor() as pool:
        list(pool.map(start_again, stopped))
    return servers


@pytest.fixture
def front(proxy: Proxy, replicas: Fleet, tmp_path: Path) -> Iterator[ProxyProcess]:
    """The proxy before both."""
    with ProxyProcess(proxy, tmp_path, {name: server.port for name, server in replicas.items()}) as process:
        yield process


@pytest.fixture
async def channel(front: ProxyProcess) -> AsyncIterator[grpc.aio.Channel]:
    """One connection to the proxy."""
    async with connection(front.target) as channel:
        yield channel


def start_again(server: ServerProcess) -> None:
    server.log_file.unlink(missing_ok=True)  # it says that the process before is serving
    server.start()


def connection(target: str) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])


def metadata(session_id: str) -> tuple[tuple[str, str], ...]:
    return (("cellserve-session", session_id),)


class SessionStream:
    """One session on a stream of its own."""

    def __init__(self, channel: grpc.aio.Channel, session_id: str) -> None:
        self.session_id = session_id
        call = channel.stream_stream(
            "/cellserve.v1.SessionService/Stream",
            request_serializer=StreamRequest.SerializeToString,
            response_deserializer=StreamResponse.FromString,
        )
        self._call: Any = call(metadata=metadata(session_id))
        self._handle = 0

    async def open(self, mode: str = "ATTACH_OR_CREATE") -> "SessionStream":
        """Open or attach the session; ConnectionError where the stream or the server does not let it."""
        opening = OpenCommand(
            requests=[1], model=MODEL, session_ids=[self.session_id], mode=OpenMode.Value(f"OPEN_MODE_{mode}")
        )
        event = await self._ask(Command(open=opening), "opened")
        self._handle = event.opened.handles[0]
        return self

    async def step(self) -> int:
        """Advance the session by one token; returns its position."""
        run = RunCommand(requests=[2], handles=[self._handle], tokens=[3])
        position: int = (await self._ask(Command(run=run), "answers")).answers.positions[0]
        return position

    @property
    def has_ended(self) -> bool:
        ended: bool = self._call.done()
        return ended

    async def ending(self) -> grpc.StatusCode:
        """The status with which the stream ends; TimeoutError when it does not."""
        async with asyncio.timeout(NOTICE_SECONDS):
            with suppress(grpc.aio.AioRpcError):
                while await self._call.read() is not grpc.aio.EOF:
                    pass
            code: grpc.StatusCode = await self._call.code()
            return code

    def cancel(self) -> None:
        self._call.cancel()

    async def _ask(self, command: Command, wanted: str) -> Any:
        try:
            await self._call.write(StreamRequest(commands=[command]))
            while True:
                frame = await self._call.read()
                if frame is grpc.aio.EOF:
                    raise ConnectionError("the stream has ended")
                for event in frame.events:
                    kind = event.WhichOneof("event")
                    if kind == wanted:
                        return event
                    if kind == "failures":
                        raise ConnectionError(event.failures.messages[0])
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise ConnectionError(str(error)) from error


async def open_all(
    channel: grpc.aio.Channel, ids: Sequence[str], mode: str = "ATTACH_OR_CREATE"
) -> list[SessionStream]:
    """Streams at once on one connection, each with one of the sessions."""
    return await asyncio.gather(*(SessionStream(channel, session_id).open(mode) for session_id in ids))


async def reopened(channel: grpc.aio.Channel, session_id: str) -> SessionStream:
    """A new stream with the session, tried until the proxy knows where that can be."""
    return await within(NOTICE_SECONDS, lambda: SessionStream(channel, session_id).open())


async def sessions_of(server: ServerProcess) -> set[str]:
    """Ids of the sessions that a server has, asked without the proxy."""
    async with connection(server.target) as channel:
        listed = await SessionServiceStub(channel).ListSessions(ListSessionsRequest(page_size=10_000))
        return {session.id for session in listed.sessions}


async def placed(replicas: Fleet, ids: Sequence[str]) -> dict[str, set[str]]:
    """Which of the sessions each replica has; each is on exactly one."""
    found = {name: await sessions_of(server) & set(ids) for name, server in replicas.items()}
    assert sorted(session_id for placed_ids in found.values() for session_id in placed_ids) == sorted(ids)
    return found


@asynccontextmanager
async def generating(server: ServerProcess) -> AsyncIterator[Callable[[], object]]:
    """Accepted work that a drain waits for, until it is called off."""
    async with connection(server.target) as channel:
        stub = SessionServiceStub(channel)
        opened = await stub.OpenSessions(OpenSessionsRequest(model=MODEL, count=1))
        call = stub.Generate(GenerateRequest(session_id=opened.session_ids[0], max_tokens=1_000_000))
        await call.read()
        yield call.cancel


async def within(seconds: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """The attempt's result, made again after a ConnectionError or an AssertionError for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await attempt()
        except (ConnectionError, AssertionError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def test_the_shipped_configuration_is_valid(proxy: Proxy) -> None:
    command = proxy.command(proxy.validating, proxy.file)
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert proxy.prints_when_valid in completed.stdout + completed.stderr


def test_the_proxy_has_no_warning_where_the_replicas_can_be_found(proxy: Proxy, tmp_path: Path) -> None:
    file = ProxyProcess(proxy, tmp_path, {"server-a": 50051, "server-b": 50052}).write_file()
    completed = subprocess.run(proxy.command(proxy.validating, file), capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "[warning]" not in (completed.stdout + completed.stderr).lower()


async def test_without_any_replica_a_call_is_refused_and_does_not_hang(proxy: Proxy, tmp_path: Path) -> None:
    nobody = {"server-a": free_port(), "server-b": free_port()}
    with ProxyProcess(proxy, tmp_path, nobody) as process:
        async with connection(process.target) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await SessionServiceStub(channel).ListSessions(ListSessionsRequest(), timeout=NOTICE_SECONDS)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_hundreds_of_streams_on_one_connection_are_all_served(proxy: Proxy, channel: grpc.aio.Channel) -> None:
    streams = await open_all(channel, [f"{proxy.program}-crowd-{number}" for number in range(MANY)])
    assert await asyncio.gather(*(stream.step() for stream in streams)) == [1] * MANY
    for stream in streams:
        stream.cancel()


async def test_a_session_is_on_one_replica_and_sessions_are_on_both(
    proxy: Proxy, replicas: Fleet, front: ProxyProcess, channel: grpc.aio.Channel
) -> None:
    ids = [f"{proxy.program}-spread-{number}" for number in range(40)]
    for stream in await open_all(channel, ids, "CREATE"):
        assert await stream.step() == 1
    found = await placed(replicas, ids)
    assert all(len(placed_ids) > len(ids) // 6 for placed_ids in found.values())

    async with connection(front.target) as other:
        # ATTACH is refused where the session is not, and so is Step.
        for stream in await open_all(other, ids, "ATTACH"):
            assert await stream.step() == 2
        for one in (channel, other):
            step = SessionServiceStub(one).Step
            for session_id in ids:
                request = StepRequest(session_id=session_id, tokens=TokenColumn(ids=[3]))
                answer = await step(request, metadata=metadata(session_id))
                assert answer.position == (3 if one is channel else 4)
    assert await placed(replicas, ids) == found


async def test_a_killed_replica_breaks_only_its_own_streams_and_the_other_serves_its_sessions(
    proxy: Proxy, replicas: Fleet, channel: grpc.aio.Channel
) -> None:
    ids = [f"{proxy.program}-kill-{number}" for number in range(300)]
    streams = {stream.session_id: stream for stream in await open_all(channel, ids)}
    found = await placed(replicas, ids)
    lost = sorted(found["server-a"])
    others = [streams[session_id] for session_id in found["server-b"]]

    replicas["server-a"].kill()
    endings = await asyncio.gather(*(streams[session_id].ending() for session_id in lost))
    assert grpc.StatusCode.OK not in endings
    # All at once, as clients do whose streams break, and before any health check: the proxy finds out by trying.
    again = await open_all(channel, lost)
    assert await asyncio.gather(*(stream.step() for stream in again)) == [1] * len(lost)
    assert await sessions_of(replicas["server-b"]) >= set(ids)

    await asyncio.to_thread(start_again, replicas["server-a"])

    async def lost_ones_are_back() -> None:
        await open_all(channel, lost)
        assert await sessions_of(replicas["server-a"]) >= set(lost)

    await within(NOTICE_SECONDS, lost_ones_are_back)
    assert await asyncio.gather(*(stream.step() for stream in others)) == [1] * len(others)


async def test_a_draining_replica_keeps_its_streams_and_gets_no_new_ones(
    proxy: Proxy, replicas: Fleet, channel: grpc.aio.Channel
) -> None:
    draining, other = replicas.values()
    ids = [f"{proxy.program}-drain-{number}" for number in range(40)]
    streams = {stream.session_id: stream for stream in await open_all(channel, ids)}
    moving = sorted((await placed(replicas, ids))["server-a"])

    async with generating(draining) as finish:
        draining.terminate()
        while await asyncio.to_thread(check, draining.target):
            pass  # it has not noticed yet
        again = await asyncio.gather(*(reopened(channel, session_id) for session_id in moving))
        assert await sessions_of(other) >= set(ids)
        assert await asyncio.gather(*(stream.step() for stream in again)) == [1] * len(moving)
        assert not any(streams[session_id].has_ended for session_id in moving)
        finish()
        endings = await asyncio.gather(*(streams[session_id].ending() for session_id in moving))
        # HAProxy resets some streams before it has passed on the status that the server gave them.
        assert set(endings) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert await asyncio.to_thread(draining.wait) == 0
    staying = [stream for session_id, stream in streams.items() if session_id not in moving]
    assert await asyncio.gather(*(stream.step() for stream in staying)) == [1] * len(staying)
