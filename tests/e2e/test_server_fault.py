"""A fault of the device ends the process: what the slab held is not to be trusted, and everybody is told so."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support import failing_server
from tests.support.failing_server import FATAL_TOKEN
from tests.support.generating import begin
from tests.support.models import write_tiny_model
from tests.support.refusals import Refused, of_call, of_error
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.wire import Follower, Wire, step_request


class FailingServer(ServerProcess):
    """The server whose device fails at one token."""

    @property
    def arguments(self) -> list[str]:
        python, _, _, *flags = super().arguments
        return [python, str(Path(failing_server.__file__)), *flags]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    write_tiny_model(tmp_path / "models" / "tiny-gru" / "1", "gru", vocab_size=11, output_size=11)
    with FailingServer(tmp_path / "server.log", tmp_path / "models") as process:
        yield process


def is_told(refused: Refused) -> bool:
    return (refused.code, refused.reason) == ("INTERNAL", "ENGINE_FAILED")


def test_a_fault_of_the_device_is_told_to_all_and_ends_the_process(wire: Wire, server: ServerProcess) -> None:
    bystander = Follower(wire, wire.other().stream())
    bystander.step([1, 2, 3])
    generating = Follower(wire, wire.stream())
    generating.step([4])
    call = begin(generating)
    stream = wire.stream()
    session = stream.open("tiny-gru")
    stream.step(session.handle, [1, 2], outputs(states=True))
    stepping = wire.sessions.Step.future(step_request(session.session_id, [FATAL_TOKEN]), timeout=30)
    failure = stepping.exception()
    assert isinstance(failure, grpc.RpcError)
    assert is_told(of_error(failure))
    assert is_told(stream.ending())
    assert is_told(bystander.stream.ending())
    assert is_told(of_call(lambda: call))
    assert server.wait() == 1
    assert "the device has failed" in server.log  # for the operator, and for nobody else
    assert "device" not in of_error(failure).message


def test_a_server_that_has_failed_is_unavailable(wire: Wire, server: ServerProcess) -> None:
    session_id = wire.open("tiny-gru").session_ids[0]
    assert is_told(of_call(lambda: wire.step(session_id, [FATAL_TOKEN])))
    assert server.wait() == 1
    assert of_call(lambda: wire.step(session_id, [1])).code == "UNAVAILABLE"
