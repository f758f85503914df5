"""TLS: a server with a certificate, and one that asks its clients for theirs."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cellserve.cli.app import run
from cellserve.v1.model_service_pb2 import ListModelsRequest
from cellserve.v1.model_service_pb2_grpc import ModelServiceStub
from tests.support.certificates import Certificates
from tests.support.models import write_tiny_model
from tests.support.server import ServerProcess


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=[False, True], ids=["server", "mutual"])
def server(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tls")
    write_tiny_model(folder / "models" / "tiny-gru" / "1", "gru", vocab_size=11, output_size=11)
    settings: dict[str, str | int | float | bool] = {
        "tls_certificate": str(certificates.path("server.pem")),
        "tls_private_key": str(certificates.path("server.key")),
    }
    if request.param:
        settings["tls_client_ca"] = str(certificates.path("authority.pem"))
    process = ServerProcess(folder / "server.log", folder / "models", settings)
    settings["listen"] = f"0.0.0.0:{process.port}"  # with TLS it may listen beyond loopback
    with process:
        yield process


def models(server: ServerProcess, credentials: grpc.ChannelCredentials | None) -> list[str]:
    """The names of the models, asked for with these credentials, or in the clear."""
    if credentials is None:
        channel = grpc.insecure_channel(server.target)
    else:
        channel = grpc.secure_channel(server.target, credentials)
    with channel:
        answer = ModelServiceStub(channel).ListModels(ListModelsRequest(), timeout=10)
    return [model.name for model in answer.models]


def test_a_client_that_trusts_the_authority_is_served(server: ServerProcess, certificates: Certificates) -> None:
    own = {
        "private_key": certificates.bytes("client.key"),
        "certificate_chain": certificates.bytes("client.pem"),
    }
    credentials = grpc.ssl_channel_credentials(certificates.bytes("authority.pem"), **own)
    assert models(server, credentials) == ["tiny-gru"]
    assert "(TLS)" in server.log


def test_a_client_without_a_certificate_is_served_where_none_is_asked(
    server: ServerProcess, certificates: Certificates
) -> None:
    credentials = grpc.ssl_channel_credentials(certificates.bytes("authority.pem"))
    if "tls_client_ca" not in server.settings:
        assert models(server, credentials) == ["tiny-gru"]
    else:
        with pytest.raises(grpc.RpcError) as refused:
            models(server, credentials)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_in_the_clear_is_not_served(server: ServerProcess) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        models(server, None)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_that_trusts_somebody_else_is_not_served(server: ServerProcess, tmp_path: Path) -> None:
    credentials = grpc.ssl_channel_credentials(Certificates(tmp_path).bytes("authority.pem"))
    with pytest.raises(grpc.RpcError) as refused:
        models(server, credentials)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_command_connects_by_tls(
    server: ServerProcess, certificates: Certificates, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--server", server.target, "--tls-ca", str(certificates.path("authority.pem"))]
    options += [
        "--tls-certificate",
        str(certificates.path("client.pem")),
        "--tls-key",
        str(certificates.path("client.key")),
    ]
    assert run([*options, "--json", "step", "1", "2"]) == 0
    assert json.loads(capfd.readouterr().out)["position"] == 2
    assert run([*options, "--json", "bench", "--sessions", "2", "--duration", "0.2"]) == 0
    assert json.loads(capfd.readouterr().out)["num_requests"] > 0


def test_the_command_without_tls_says_that_nobody_answers(
    server: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["--server", server.target, "models"]) == 1
    assert "no server answers" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tls-ca", "/no/such/file"], "/no/such/file cannot be read"),
        (["--tls-certificate", __file__], "go together"),
    ],
)
def test_the_command_tells_what_is_wrong_with_files_of_tls(
    server: ServerProcess, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["--server", server.target, *arguments, "models"]) == 2
    assert said in capfd.readouterr().err
