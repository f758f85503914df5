"""A name with addresses, over TLS: the certificate is held against the name, not against the address."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellserve import AsyncClient, Tls
from cellserve.errors import Unavailable
from tests.support.certificates import Certificates
from tests.support.models import write_tiny_model
from tests.support.server import ServerProcess


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Of a server that is localhost, or 127.0.0.1."""
    return Certificates(tmp_path)


@pytest.fixture
def server(certificates: Certificates, tmp_path: Path) -> Iterator[ServerProcess]:
    write_tiny_model(tmp_path / "models" / "tiny-gru" / "1", "gru", vocab_size=11, output_size=11)
    settings: dict[str, str | int | float | bool] = {
        "tls_certificate": str(certificates.path("server.pem")),
        "tls_private_key": str(certificates.path("server.key")),
    }
    with ServerProcess(tmp_path / "server.log", tmp_path / "models", settings) as process:
        yield process


async def test_the_certificate_of_every_address_is_that_of_the_name(
    server: ServerProcess, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", ("127.0.0.1", server.port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    tls = Tls(root_certificates=certificates.path("authority.pem"))
    async with AsyncClient(f"dns:///localhost:{server.port}", tls=tls) as client, client.session("tiny-gru") as session:
        assert (await session.step([1, 2])).position == 2
    async with AsyncClient(f"dns:///cells.internal:{server.port}", tls=tls) as client:
        with pytest.raises(Unavailable):
            await client.models(timeout_seconds=1)
