"""The front end: the gRPC server with its services. It lives in the engine's process, or as a worker beside it."""

import asyncio
import time
from collections.abc import Sequence

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cellserve.v1 import model_service_pb2, session_service_pb2
from cellserve_service.control import Facts
from cellserve_service.errors import StartError
from cellserve_service.front import Front, Outlet
from cellserve_service.handlers import Behavior, CallsInFlight, add_service
from cellserve_service.messages import Event
from cellserve_service.model_service import ModelServicer
from cellserve_service.ports import cannot_listen
from cellserve_service.session_service import SessionServicer
from cellserve_service.settings import Settings
from cellserve_service.statistics import FrontStatistics, Histogram
from cellserve_service.stream import ENGINE_FAILED, STOPPING, StreamServicer
from cellserve_service.unary import UnaryCalls

SESSION_SERVICE = session_service_pb2.DESCRIPTOR.services_by_name["SessionService"]
MODEL_SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
LOOP_LAG_INTERVAL_SECONDS = 0.25
GRACE_SECONDS = 1.0


class FrontEnd:
    """Decodes, checks and frames: what it takes goes to the engine as commands, what comes back goes out in frames.

    listen: the address. is_shared: other front ends listen there, too. Raises StartError.
    """

    def __init__(self, settings: Settings, listen: str, *, is_shared: bool = False) -> None:
        self._settings = settings
        self._statistics = FrontStatistics()
        self._in_flight = CallsInFlight()
        self._server = _grpc_server(settings, is_shared=is_shared)
        self.port = _bind(self._server, settings, listen)
        self._healthy = health.aio.HealthServicer()
        self.front: Front
        self._streams: StreamServicer
        self._sessions: SessionServicer

    async def prepare(self) -> None:
        """Nothing: there is no process to start."""

    async def serve(self, outlet: Outlet, facts: Facts, number: int = 0) -> None:
        """Serve from now on. outlet: takes commands for the engine. number: of this front end."""
        front = self.front = Front(outlet, number)
        self._add_services(front, facts)
        self._add_standard_services()
        await self._server.start()
        for name in ("", SESSION_SERVICE.full_name, MODEL_SERVICE.full_name):
            await self._healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._lag = asyncio.create_task(watch_loop_lag(self._statistics.event_loop_lag))

    def deliver(self, events: Sequence[Event]) -> None:
        """Hand out events of the engine."""
        self.front.deliver(events)

    async def go_unhealthy(self) -> None:
        """Let health checks say NOT_SERVING from now on."""
        await self._healthy.enter_graceful_shutdown()

    async def stop(self, patience_seconds: float) -> bool:
        """End the streams, and all else. Returns whether every call had ended after so long."""
        self._streams.end_streams(STOPPING)
        in_time = True
        try:
            async with asyncio.timeout(patience_seconds):
                await self._in_flight.wait_for_none()  # slow readers take their answers
        except TimeoutError:
            in_time = False
        await self._end()
        return in_time

    async def fail(self) -> None:
        """The engine has failed: tell so everybody who waits, and end."""
        self._streams.end_streams(ENGINE_FAILED)
        self._sessions.fail_all(ENGINE_FAILED)
        await self._end()

    async def close(self) -> None:
        """End what still runs."""
        await self._server.stop(0.0)

    def statistics(self) -> FrontStatistics:
        """A copy of what was counted since the start."""
        copy = FrontStatistics()
        copy.add(self._statistics)
        return copy

    async def _end(self) -> None:
        await self._server.stop(GRACE_SECONDS)
        self._lag.cancel()

    def _add_services(self, front: Front, facts: Facts) -> None:
        settings, limits, statistics = self._settings, facts.limits, self._statistics

        def new_calls() -> UnaryCalls:
            return UnaryCalls(front, statistics, max_unsent_bytes=settings.max_stream_unsent_bytes)

        sessions = self._sessions = SessionServicer(new_calls, limits)
        streams = self._streams = StreamServicer(
            front,
            statistics,
            max_open_sessions=limits.max_open_sessions,
            max_answer_bytes=settings.max_answer_bytes,
            max_unsent_bytes=settings.max_stream_unsent_bytes,
        )
        models = ModelServicer(
            [model_service_pb2.Model.FromString(model) for model in facts.models],
            limits,
            max_message_bytes=settings.max_message_bytes,
        )
        behaviors: dict[str, Behavior] = {
            "stream": streams.serve,
            "open_sessions": sessions.open_sessions,
            "get_session": sessions.get_session,
            "list_sessions": sessions.list_sessions,
            "reset_session": sessions.reset_session,
            "fork_session": sessions.fork_session,
            "close_session": sessions.close_session,
            "export_session": sessions.export_session,
            "import_session": sessions.import_session,
            "checkpoint_session": sessions.checkpoint_session,
            "rollback_session": sessions.rollback_session,
            "step": sessions.step,
            "generate": sessions.generate,
        }
        add_service(self._server, SESSION_SERVICE, behaviors, statistics, self._in_flight)
        behaviors = {
            "list_models": models.list_models,
            "get_model": models.get_model,
            "load_model": models.load_model,
            "unload_model": models.unload_model,
        }
        add_service(self._server, MODEL_SERVICE, behaviors, statistics, self._in_flight)

    def _add_standard_services(self) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._healthy, self._server)
        channelz.add_channelz_servicer(self._server)
        names = (
            SESSION_SERVICE.full_name,
            MODEL_SERVICE.full_name,
            health.SERVICE_NAME,
            "grpc.channelz.v1.Channelz",
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)


def tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What the TLS files hold; None without TLS. Raises StartError."""
    if settings.tls_certificate is None or settings.tls_private_key is None:
        return None
    authority = settings.tls_client_ca
    try:
        return grpc.ssl_server_credentials(
            [(settings.tls_private_key.read_bytes(), settings.tls_certificate.read_bytes())],
            root_certificates=None if authority is None else authority.read_bytes(),
            require_client_auth=authority is not None,
        )
    except OSError as error:
        raise StartError(f"cannot read the TLS files: {error}") from error


async def watch_loop_lag(lag: Histogram) -> None:
    """Count how late the event loop runs a timer, until cancelled."""
    while True:
        due = time.monotonic() + LOOP_LAG_INTERVAL_SECONDS
        await asyncio.sleep(LOOP_LAG_INTERVAL_SECONDS)
        lag.observe_one(max(0.0, time.monotonic() - due))


def _grpc_server(settings: Settings, *, is_shared: bool) -> grpc.aio.Server:
    return grpc.aio.server(
        options=[
            # A second server on the port must fail, not share its connections.
            ("grpc.so_reuseport", int(is_shared)),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),  # ours are kept under max_answer_bytes
            ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 3),
        ]
    )


def _bind(server: grpc.aio.Server, settings: Settings, listen: str) -> int:
    credentials = tls_credentials(settings)
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise cannot_listen(listen) from error
