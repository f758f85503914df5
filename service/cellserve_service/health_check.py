"""Asks a server for its health, for containers: `python -m cellserve_service.health_check [HOST:PORT]`."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2

TIMEOUT_SECONDS = 3.0


def check(target: str) -> bool:
    """Whether the server at `target` says SERVING. A server with TLS is asked in the clear: it answers not at all."""
    with grpc.insecure_channel(target) as channel:
        try:
            ask = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = ask(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    listen = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CELLSERVE_LISTEN", "127.0.0.1:50051")
    target = listen.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
    raise SystemExit(0 if check(target) else 1)


if __name__ == "__main__":
    main()
