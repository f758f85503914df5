"""Asks a server for its health by the standard service."""

from collections.abc import Generator

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse

__all__ = ["health", "watch_health"]

_SERVICE = DESCRIPTOR.services_by_name["Health"].full_name


def health(channel: grpc.Channel, service: str) -> str:
    """The name of the service's status."""
    check = channel.unary_unary(
        f"/{_SERVICE}/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    return _name(check(HealthCheckRequest(service=service), timeout=10))


def watch_health(channel: grpc.Channel, service: str) -> Generator[str, None, None]:
    """The name of the service's status, and of every one that follows; broken off by closing the iterator."""
    watch = channel.unary_stream(
        f"/{_SERVICE}/Watch",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    call = watch(HealthCheckRequest(service=service), timeout=60)
    try:
        for answer in call:
            yield _name(answer)
    finally:
        call.cancel()


def _name(answer: HealthCheckResponse) -> str:
    return HealthCheckResponse.ServingStatus.Name(answer.status)
