"""Servers that go away, stop, or are none: what goes on as if nothing were, and what the client raises else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cellserve import AsyncClient, CellserveError, Client, Tls
from cellserve.errors import ConnectionLost, Draining, SessionNotFound, Unavailable
from tests.support.server import ServerProcess, free_port


@pytest.fixture
async def own_server(models_directory: Path, tmp_path: Path) -> AsyncIterator[ServerProcess]:
    """A server that the test may harm."""
    server = ServerProcess(tmp_path / "server.log", models_directory)
    with server:
        yield server


class Cable:
    """A TCP relay to a server that can be cut, and can swallow what the server says."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.swallows_answers = False
        self.is_unplugged = False
        self.num_bytes_sent = 0

    async def cut(self) -> None:
        """Break every connection off."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.swallows_answers = False

    @asynccontextmanager
    async def plugged(self) -> AsyncIterator[str]:
        relay = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        finally:
            relay.close()
            await self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_unplugged:
            writer.transport.abort()
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers |= {writer, server_writer}
        for source, target, is_answer in ((reader, server_writer, False), (server_reader, writer, True)):
            task = asyncio.create_task(self._relay(source, target, is_answer))
            self._tasks.add(task)

    async def _relay(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_answer: bool) -> None:
        try:
            while data := await source.read(65536):
                if is_answer and self.swallows_answers:
                    continue
                if not is_answer:
                    self.num_bytes_sent += len(data)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.transport.abort()


@pytest.fixture
def cable(server: ServerProcess) -> Cable:
    return Cable(server.port)


async def position_of(client: AsyncClient, session_id: str) -> int:
    return next(session.position for session in await client.sessions() if session.id == session_id)


async def test_a_step_whose_answer_was_lost_is_answered_over_the_next_connection_and_runs_once(
    server: ServerProcess, cable: Cable
) -> None:
    async with cable.plugged() as target, AsyncClient(target) as client, AsyncClient(server.target) as observer:
        session = await client.open_session("tiny-gru", id="cut-off", keep=False)
        expected = await session.step([1, 2, 3], states=True)
        cable.swallows_answers = True
        step = asyncio.create_task(session.step([4, 5], states=True))
        while await position_of(observer, "cut-off") < 5:
            await asyncio.sleep(0)
        await cable.cut()
        answered = await step
        assert answered.position == session.position == await position_of(observer, "cut-off") == 5
        async with await session.fork() as fork:
            await fork.reset()
            replayed = await fork.step([1, 2, 3, 4, 5], states=True)
        assert answered.states is not None
        assert replayed.states is not None
        assert expected.states is not None
        assert abs(answered.states - replayed.states[3:]).max() < 1e-5
        await session.close()


async def test_a_step_without_a_connection_until_its_timeout_is_in_doubt_and_its_repeat_runs_nothing_twice(
    server: ServerProcess, cable: Cable
) -> None:
    async with cable.plugged() as target, AsyncClient(target) as client, AsyncClient(server.target) as observer:
        session = await client.open_session("tiny-gru", id="in-doubt", keep=False)
        await session.step([1, 2, 3])
        cable.swallows_answers = True
        step = asyncio.create_task(session.step([4, 5], timeout_seconds=1))
        while await position_of(observer, "in-doubt") < 5:
            await asyncio.sleep(0)
        cable.is_unplugged = True
        await cable.cut()
        with pytest.raises(ConnectionLost) as lost:
            await step
        assert lost.value.in_doubt
        assert lost.value.session_id == "in-doubt"
        assert session.position == 3
        cable.is_unplugged = False
        repeated = await session.step([4, 5])
        assert repeated.position == session.position == await position_of(observer, "in-doubt") == 5
        await session.close()


async def test_a_session_goes_on_over_a_new_connection(server: ServerProcess, cable: Cable) -> None:
    async with cable.plugged() as target, AsyncClient(target) as client:
        sessions = await client.open_sessions("tiny-gru", 20)
        for round_number in range(1, 4):
            results = await asyncio.gather(*(session.step(round_number) for session in sessions))
            assert {result.position for result in results} == {round_number}
            await cable.cut()
        assert (await client.step_many(sessions, [1] * 20)).positions.tolist() == [4] * 20


async def test_a_step_given_up_over_a_lost_connection_leaves_a_session_that_just_works(
    server: ServerProcess, cable: Cable
) -> None:
    async with cable.plugged() as target, AsyncClient(target) as client, AsyncClient(server.target) as observer:
        session = await client.open_session("tiny-gru", id="given-up", keep=False)
        await session.step([1, 2, 3])
        cable.swallows_answers = True
        step = asyncio.create_task(session.step([4, 5]))
        while await position_of(observer, "given-up") < 5:
            await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        following = asyncio.create_task(session.step([6]))
        await asyncio.sleep(0)
        await cable.cut()
        assert (await following).position == 6
        await session.close()


async def test_a_killed_server_is_unavailable_after_the_timeout_and_a_new_one_without_a_store_has_forgotten(
    own_server: ServerProcess,
) -> None:
    async with AsyncClient(own_server.target, timeout_seconds=20) as client:
        session = await client.open_session("tiny-gru", id="forgotten")
        generation = session.generate(1_000_000, timeout_seconds=0.5)
        other = await client.open_session("tiny-gru")
        await anext(generation)
        own_server.kill()
        with pytest.raises(Unavailable):
            async for _ in generation:
                pass
        for call in (
            other.step(1, timeout_seconds=0.2),
            other.export_state(timeout_seconds=0.2),
            client.ping(),
            client.models(timeout_seconds=0.2),
            client.open_session("tiny-gru", timeout_seconds=0.2),
        ):
            with pytest.raises(Unavailable):
                await call
        own_server.start()
        while True:
            try:
                await client.ping()
                break
            except Unavailable:
                continue
        for lost in (session, other):
            with pytest.raises(SessionNotFound):
                await lost.step(1)
        fresh = await client.open_session("tiny-gru")
        assert (await fresh.step(1)).position == 1


async def test_a_draining_server_takes_no_new_sessions_and_finishes_what_it_has(own_server: ServerProcess) -> None:
    async with AsyncClient(own_server.target) as client:
        *busy, witness = await client.open_sessions("tiny-gru", 9)
        held = [asyncio.create_task(session.step([1] * 4096, at="none")) for session in busy for _ in range(2)]
        while not any(session.num_pending_tokens for session in await client.sessions()):
            assert not held[-1].done(), "the server is too fast for this test: give it more to do"
        generation = witness.generate(1_000_000)
        await anext(generation)
        own_server.terminate()
        refusal: CellserveError | None = None
        while refusal is None:
            try:
                await (await client.open_session("tiny-gru", timeout_seconds=0.1)).close()
            except CellserveError as error:
                refusal = error
        assert isinstance(refusal, Draining)
        assert (await asyncio.gather(*held))[-1].position == 8192
        await generation.aclose()
        assert await asyncio.to_thread(own_server.wait) == 0


async def test_nobody_listening_until_the_timeout_is_unavailable() -> None:
    async with AsyncClient(f"127.0.0.1:{free_port()}", timeout_seconds=0.3) as client:
        started = time.monotonic()
        for call in (client.ping, client.models, lambda: client.open_session("pycode")):
            with pytest.raises(Unavailable):
                await call()
        assert time.monotonic() - started < 10


async def test_tls_at_a_server_without_it_is_unavailable(server: ServerProcess) -> None:
    for tls in (True, Tls(), Tls(root_certificates=CERTIFICATE)):
        async with AsyncClient(server.target, tls=tls, timeout_seconds=10) as client:
            with pytest.raises(Unavailable):
                await client.ping()


def test_a_private_key_is_not_shown() -> None:
    assert "secret" not in repr(Tls(private_key=b"secret", certificate_chain=b"public"))


def test_certificates_may_be_files(tmp_path: Path) -> None:
    file = tmp_path / "roots.pem"
    file.write_bytes(CERTIFICATE)
    Tls(root_certificates=file).credentials()
    Tls(root_certificates=str(file)).credentials()
    with pytest.raises(FileNotFoundError):
        Tls(root_certificates=tmp_path / "missing.pem").credentials()


def test_a_blocking_client_whose_server_is_killed_says_so_and_closes(own_server: ServerProcess) -> None:
    with Client(own_server.target, timeout_seconds=0.5) as client:
        session = client.open_session("tiny-gru")
        session.step(1)
        own_server.kill()
        with pytest.raises(Unavailable):
            session.step(2)
        started = time.monotonic()
    assert time.monotonic() - started < 10


CERTIFICATE = b"""-----BEGIN CERTIFICATE-----
MIIBtjCCAVugAwIBAgITBmyf1XSXNmY/Owua2eiedgPySjAKBggqhkjOPQQDAjA5
MQswCQYDVQQGEwJVUzEPMA0GA1UEChMGQW1hem9uMRkwFwYDVQQDExBBbWF6b24g
Um9vdCBDQSAzMB4XDTE1MDUyNjAwMDAwMFoXDTQwMDUyNjAwMDAwMFowOTELMAkG
A1UEBhMCVVMxDzANBgNVBAoTBkFtYXpvbjEZMBcGA1UEAxMQQW1hem9uIFJvb3Qg
Q0EgMzBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABCmXp8ZBf8ANm+gBG1bG8lKl
ui2yEujSLtf6ycXYqm0fc4E7O5hrOXwzpcVOho6AF2hiRVd9RFgdszflZwjrZt6j
QjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgGGMB0GA1UdDgQWBBSr
ttvXBp43rDCGB5Fwx5zEGbF4wDAKBggqhkjOPQQDAgNJADBGAiEA4IWSoxe3jfkr
BqWTrBqYaGFy+uGh0PsceGCmQ5nFuMQCIQCcAu/xlJyzlvnrxir4tiz+OpAUFteM
YyRIHN8wfdVoOw==
-----END CERTIFICATE-----
"""
