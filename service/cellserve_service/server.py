"""Puts the server together and runs it: models, engine, gRPC, metrics, signals, drain. The composition root."""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence

import grpc
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from cellserve.v1 import model_service_pb2, session_service_pb2
from cellserve_service.engine import Engine
from cellserve_service.engine_loop import EngineLoop
from cellserve_service.front import Front
from cellserve_service.handlers import Behavior, CallsInFlight, add_service
from cellserve_service.idempotency import RequestMemory
from cellserve_service.keeper import Keeper
from cellserve_service.messages import Drain, MovedAway
from cellserve_service.metrics import GrpcMetrics, ServerCollector
from cellserve_service.model_service import ModelServicer
from cellserve_service.session_service import SessionServicer
from cellserve_service.settings import Settings
from cellserve_service.statistics import Statistics
from cellserve_service.stepping import Stepper
from cellserve_service.stores import open_store
from cellserve_service.stores.operations import StateStore, StoreError
from cellserve_service.stream import ENGINE_FAILED, STOPPING, StreamServicer
from cellserve_service.unary import UnaryCalls

SESSION_SERVICE = session_service_pb2.DESCRIPTOR.services_by_name["SessionService"]
MODEL_SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
LOOP_LAG_INTERVAL_SECONDS = 0.25

log = structlog.get_logger()


class StartError(Exception):
    """The server cannot start: what is wrong and what to do, in one line."""


class Server:
    """One server process: an event loop for gRPC and the engine, a thread for metrics."""

    def __init__(self, settings: Settings, load_steppers: "LoadSteppers") -> None:
        self._settings = settings
        self._load_steppers = load_steppers
        self._statistics = Statistics()
        self._engine: Engine | None = None
        self._in_flight = CallsInFlight()
        self._failed = False

    async def run(self) -> int:
        """Serve until a signal or a fault; returns the exit status."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stopping.set)
        registry = CollectorRegistry()
        registry.register(
            ServerCollector(self._statistics, lambda: None if self._engine is None else self._engine.core)
        )
        server = self._grpc_server()
        port = self._bind(server)
        metrics_port = self._serve_metrics(registry)

        store = await self._open_store()
        engine = self._engine = Engine(
            self._load_steppers(settings),
            settings.engine_limits(),
            self._statistics,
            has_store=store is not None,
            wall_offset=time.time() - time.monotonic(),
        )

        def fail(_: BaseException) -> None:
            self._failed = True
            stopping.set()

        engine_loop = EngineLoop(
            engine,
            deliver=lambda events: front.deliver(events),
            failed=fail,
            ask_store=None if store is None else lambda requests: keeper.submit(requests),
            checkpoint_interval_seconds=settings.checkpoint_interval_seconds,
        )
        front = Front(engine_loop.post)
        tasks = [asyncio.create_task(self._watch_loop_lag())]
        if store is not None:
            keeper = Keeper(store, engine_loop.post, self._statistics)
            tasks.append(asyncio.create_task(_watched(keeper.run(), fail)))
            moved = store.watch(lambda session_id, epoch: engine_loop.post(MovedAway(session_id, epoch)))
            tasks.append(asyncio.create_task(_watched(moved, fail)))
        streams, sessions = self._add_services(server, front, engine, GrpcMetrics(registry))
        healthy = self._add_standard_services(server)
        await server.start()
        for name in ("", SESSION_SERVICE.full_name, MODEL_SERVICE.full_name):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._announce(engine, port, metrics_port)
        await stopping.wait()
        await healthy.enter_graceful_shutdown()
        if self._failed:
            streams.end_streams(ENGINE_FAILED)
            sessions.fail_all(ENGINE_FAILED)
            await server.stop(1.0)
            log.error(
                "engine_failed", advice="restart the server; durable sessions go on from the store, others are lost"
            )
            return 1
        await self._drain(server, front, streams)
        engine_loop.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if store is not None:
            await store.close()
        return 1 if self._failed else 0

    async def _open_store(self) -> StateStore | None:
        settings = self._settings
        if not settings.store:
            return None
        store = open_store(
            settings.store,
            # Never 0, and positive in 64 bits with a sign.
            replica=secrets.randbits(62) + 1,
            ended_memory_seconds=settings.ended_session_memory_seconds,
        )
        try:
            await store.open()
        except StoreError as error:
            raise StartError(f"cannot use the state store: {error}") from error
        for warning in store.warnings:
            log.warning("store", advice=warning)
        return store

    def _grpc_server(self) -> grpc.aio.Server:
        settings = self._settings
        return grpc.aio.server(
            options=[
                # A second server on the port must fail, not share its connections.
                ("grpc.so_reuseport", 0),
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

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        try:
            if settings.tls_certificate is None or settings.tls_private_key is None:
                return server.add_insecure_port(settings.listen)
            authority = settings.tls_client_ca
            credentials = grpc.ssl_server_credentials(
                [(settings.tls_private_key.read_bytes(), settings.tls_certificate.read_bytes())],
                root_certificates=None if authority is None else authority.read_bytes(),
                require_client_auth=authority is not None,
            )
            return server.add_secure_port(settings.listen, credentials)
        except RuntimeError as error:
            raise StartError(
                f"cannot listen on {settings.listen}: the address is in use or not this machine's; choose another "
                "with --listen"
            ) from error
        except OSError as error:
            raise StartError(f"cannot read the TLS files: {error}") from error

    def _serve_metrics(self, registry: CollectorRegistry) -> int:
        host, _, port = self._settings.metrics_listen.rpartition(":")
        try:
            http_server, _ = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise StartError(
                f"cannot serve metrics on {self._settings.metrics_listen}: {error.strerror or error}; choose another "
                "with --metrics-listen"
            ) from error
        return http_server.server_port

    def _add_services(
        self, server: grpc.aio.Server, front: Front, engine: Engine, metrics: GrpcMetrics
    ) -> tuple[StreamServicer, SessionServicer]:
        settings, limits = self._settings, engine.core.limits

        def new_calls() -> UnaryCalls:
            return UnaryCalls(front, self._statistics, max_unsent_bytes=settings.max_stream_unsent_bytes)

        sessions = SessionServicer(new_calls, RequestMemory(settings.ended_session_memory_seconds), limits)
        streams = StreamServicer(
            front,
            self._statistics,
            max_open_sessions=limits.max_open_sessions,
            max_answer_bytes=settings.max_answer_bytes,
            max_unsent_bytes=settings.max_stream_unsent_bytes,
        )
        models = ModelServicer(
            [served.info for served in engine.core.served],
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
        add_service(server, SESSION_SERVICE, behaviors, metrics, self._in_flight)
        add_service(
            server,
            MODEL_SERVICE,
            {
                "list_models": models.list_models,
                "get_model": models.get_model,
                "load_model": models.load_model,
                "unload_model": models.unload_model,
            },
            metrics,
            self._in_flight,
        )
        return streams, sessions

    def _add_standard_services(self, server: grpc.aio.Server) -> health.aio.HealthServicer:
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        channelz.add_channelz_servicer(server)
        names = (
            SESSION_SERVICE.full_name,
            MODEL_SERVICE.full_name,
            health.SERVICE_NAME,
            "grpc.channelz.v1.Channelz",
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        return healthy

    async def _drain(self, server: grpc.aio.Server, front: Front, streams: StreamServicer) -> None:
        """Refuse new work, finish what was accepted, tell every stream, stop."""
        timeout = self._settings.drain_timeout_seconds
        log.info("draining", timeout_seconds=timeout)
        front.post(Drain(timeout))
        try:
            async with asyncio.timeout(timeout):
                await front.drained.wait()
                streams.end_streams(STOPPING)
                await self._in_flight.wait_for_none()  # slow readers take their answers
        except TimeoutError:
            log.warning("drain_timed_out", timeout_seconds=timeout)
            streams.end_streams(STOPPING)
        await server.stop(grace=1.0)
        log.info("stopped")

    async def _watch_loop_lag(self) -> None:
        while True:
            due = time.monotonic() + LOOP_LAG_INTERVAL_SECONDS
            await asyncio.sleep(LOOP_LAG_INTERVAL_SECONDS)
            self._statistics.event_loop_lag.observe_one(max(0.0, time.monotonic() - due))

    def _announce(self, engine: Engine, port: int, metrics_port: int) -> None:
        settings = self._settings
        host = settings.listen.rpartition(":")[0]
        security = "insecure" if settings.tls_certificate is None else "TLS"
        metrics_host = settings.metrics_listen.rpartition(":")[0]
        lines = [
            f"cellserve-server on {host}:{port} ({security}), metrics on http://{metrics_host}:{metrics_port}/metrics"
        ]
        for served in engine.core.served:
            info = served.info
            layers = "1 layer" if info.num_layers == 1 else f"{info.num_layers} layers"
            lines.append(
                f"  {info.name} version {info.version}: {info.cell}, {layers}, hidden size "
                f"{info.hidden_size}, {info.num_parameters:,} parameters in {settings.weights}, on {info.device}"
            )
        print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201 - what the command says at its start
        log.info("serving", listen=f"{host}:{port}", models=[served.info.name for served in engine.core.served])


async def _watched(work: Coroutine[object, object, None], failed: Callable[[BaseException], None]) -> None:
    """Run what must run as long as the server does: an exception of it ends the server."""
    try:
        await work
    except Exception as error:
        failed(error)
        log.exception("store_failed")


class LoadSteppers:
    """Loads every model of the settings' directory, largest version each."""

    def __call__(self, settings: Settings) -> Sequence[Stepper]:
        # Imported here: the rest of the service never loads torch, nor does its import.
        from cellserve_model import ModelError, bundled_models_directory, list_models, load_stepper

        directory = settings.models or bundled_models_directory()
        try:
            versions = list_models(directory)
            if not versions:
                raise StartError(f"no models in {directory}: it needs <name>/<version>/config.json")
            steppers: list[Stepper] = []
            for name, entry in sorted(versions.items()):
                stepper = load_stepper(
                    directory / name / str(max(entry)),
                    name=name,
                    version=max(entry),
                    device=settings.device,
                    num_slots=min(settings.max_slots, settings.max_sessions),
                    deterministic=settings.deterministic,
                    num_threads=settings.num_threads or _default_num_threads(),
                    weights=settings.weights,
                )
                stepper.warm_up()
                steppers.append(stepper)
        except ModelError as error:
            raise StartError(str(error)) from error
        return steppers


def _default_num_threads() -> int:
    """One core is left to gRPC and its clients: threads that share a cell step wait for each other in a spin, so that
    with fewer cores than threads a step takes ten times as long."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)
