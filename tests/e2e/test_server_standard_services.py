"""The standard services beside ours: health, reflection and channelz."""

import subprocess
import sys
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_channelz.v1 import channelz_pb2
from grpc_reflection.v1alpha import reflection_pb2

from cellserve.v1 import errors_pb2, model_service_pb2, session_service_pb2, stream_pb2, values_pb2
from cellserve.v1.model_service_pb2 import ListModelsRequest, LoadModelRequest, UnloadModelRequest
from tests.support.health import health
from tests.support.refusals import of_call
from tests.support.server import ServerProcess, free_port
from tests.support.wire import Follower, Wire

SERVICES = [
    "cellserve.v1.ModelService",
    "cellserve.v1.SessionService",
    "grpc.channelz.v1.Channelz",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
]


def reflect(wire: Wire, **asked: str) -> reflection_pb2.ServerReflectionResponse:
    call = wire.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest()
    for name, value in asked.items():
        setattr(request, name, value)
    [answer] = call(iter([request]), timeout=10)
    return answer


@pytest.mark.parametrize("service", ["", *SERVICES[:2]])
def test_every_service_of_ours_is_healthy(wire: Wire, service: str) -> None:
    assert health(wire.channel, service) == "SERVING"


def test_the_health_of_an_unknown_service_is_not_found(wire: Wire) -> None:
    assert of_call(lambda: health(wire.channel, "cellserve.v1.NoSuchService")).code == "NOT_FOUND"


def test_the_health_check_for_containers_says_whether_a_server_serves(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "cellserve_service.health_check"]
    assert subprocess.run([*command, server.target], check=False).returncode == 0
    assert subprocess.run([*command, f"127.0.0.1:{free_port()}"], check=False).returncode == 1


def test_reflection_lists_the_services(wire: Wire) -> None:
    listed = reflect(wire, list_services="").list_services_response.service
    assert sorted(service.name for service in listed) == SERVICES


@pytest.mark.parametrize("module", [errors_pb2, values_pb2, stream_pb2, session_service_pb2, model_service_pb2])
def test_reflection_gives_the_contract_as_it_is(wire: Wire, module: ModuleType) -> None:
    descriptor = module.DESCRIPTOR
    answer = reflect(wire, file_by_filename=descriptor.name)
    expected = FileDescriptorProto()
    descriptor.CopyToProto(expected)
    files = [FileDescriptorProto.FromString(file) for file in answer.file_descriptor_response.file_descriptor_proto]
    assert expected in files


def test_reflection_finds_a_message_by_its_name(wire: Wire) -> None:
    answer = reflect(wire, file_containing_symbol="cellserve.v1.StreamRequest")
    names = [
        FileDescriptorProto.FromString(file).name for file in answer.file_descriptor_response.file_descriptor_proto
    ]
    assert "cellserve/v1/stream.proto" in names


def test_channelz_counts_the_calls_of_the_server(wire: Wire) -> None:
    def started() -> int:
        get = wire.channel.unary_unary(
            "/grpc.channelz.v1.Channelz/GetServers",
            request_serializer=channelz_pb2.GetServersRequest.SerializeToString,
            response_deserializer=channelz_pb2.GetServersResponse.FromString,
        )
        [server] = get(channelz_pb2.GetServersRequest(), timeout=10).server
        return int(server.data.calls_started)

    before = started()
    for _ in range(5):
        wire.models.ListModels(ListModelsRequest())
    assert started() == before + 6


def test_models_are_neither_loaded_nor_unloaded_at_run_time(wire: Wire) -> None:
    for call in (
        lambda: wire.models.LoadModel(LoadModelRequest(name="tiny-gru")),
        lambda: wire.models.UnloadModel(UnloadModelRequest(name="tiny-gru")),
    ):
        assert of_call(call).code == "UNIMPLEMENTED"
    session = Follower(wire, wire.stream())
    session.step([1])


def test_a_method_that_does_not_exist_is_unimplemented(wire: Wire) -> None:
    assert of_call(lambda: wire.raw_call("NoSuchMethod", b"")).code == "UNIMPLEMENTED"
