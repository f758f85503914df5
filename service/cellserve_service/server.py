"""Puts the server together and runs it: models, engine, front ends, metrics, signals, drain. The composition root."""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence

import structlog
from prometheus_client import CollectorRegistry, start_http_server

from cellserve_service.control import Facts
from cellserve_service.engine import Engine
from cellserve_service.engine_loop import EngineLoop
from cellserve_service.errors import StartError
from cellserve_service.front_end import FrontEnd
from cellserve_service.idempotency import RequestMemory
from cellserve_service.keeper import Keeper
from cellserve_service.messages import Drain, Drained, Event, MovedAway
from cellserve_service.metrics import ServerCollector
from cellserve_service.model_service import describe
from cellserve_service.settings import Settings
from cellserve_service.statistics import Statistics
from cellserve_service.stepping import Stepper
from cellserve_service.stores import open_store
from cellserve_service.stores.operations import StateStore, StoreError
from cellserve_service.workers import Workers

log = structlog.get_logger()


class Server:
    """The engine's process: an event loop for the engine and, with one worker, for gRPC; a thread for metrics.

    has_workers_beside: whether front ends have processes of their own; by default, when there are several.
    """

    def __init__(
        self, settings: Settings, load_steppers: "LoadSteppers", *, has_workers_beside: bool | None = None
    ) -> None:
        self._settings = settings
        self._load_steppers = load_steppers
        self._has_workers_beside = settings.workers > 1 if has_workers_beside is None else has_workers_beside
        self._statistics = Statistics()
        self._engine: Engine | None = None
        self._drained = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Serve until a signal or a fault; returns the exit status."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stopping.set)
        # Here or in processes of their own, front ends are told the same.
        front_ends = Workers(settings) if self._has_workers_beside else FrontEnd(settings, settings.listen)
        try:
            return await self._run(front_ends, stopping)
        finally:
            await front_ends.close()

    async def _run(self, front_ends: FrontEnd | Workers, stopping: asyncio.Event) -> int:
        settings = self._settings
        registry = CollectorRegistry()
        registry.register(
            ServerCollector(
                self._statistics, front_ends.statistics, lambda: None if self._engine is None else self._engine.core
            )
        )
        metrics_port = self._serve_metrics(registry)

        store = await self._open_store()
        await front_ends.prepare()
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

        def deliver(events: list[Event]) -> None:
            if isinstance(events[-1], Drained):
                events.pop()
                self._drained.set()
            front_ends.deliver(events)

        engine_loop = EngineLoop(
            engine,
            memory=RequestMemory(settings.ended_session_memory_seconds),
            deliver=deliver,
            failed=fail,
            ask_store=None if store is None else lambda requests: keeper.submit(requests),
            checkpoint_interval_seconds=settings.checkpoint_interval_seconds,
        )
        tasks: list[asyncio.Task[None]] = []
        if store is not None:
            keeper = Keeper(store, engine_loop.post, self._statistics)
            tasks.append(asyncio.create_task(_watched(keeper.run(), fail)))
            moved = store.watch(lambda session_id, epoch: engine_loop.post(MovedAway(session_id, epoch)))
            tasks.append(asyncio.create_task(_watched(moved, fail)))
        models = tuple(describe(served.info).SerializeToString() for served in engine.core.served)
        await front_ends.serve(engine_loop, Facts(models, engine.core.limits))
        self._announce(engine, front_ends.port, metrics_port)
        await stopping.wait()
        await front_ends.go_unhealthy()
        if self._failed:
            await front_ends.fail()
            log.error(
                "engine_failed", advice="restart the server; durable sessions go on from the store, others are lost"
            )
            return 1
        await self._drain(engine_loop, front_ends)
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

    async def _drain(self, engine_loop: EngineLoop, front_ends: FrontEnd | Workers) -> None:
        """Refuse new work, finish what was accepted, tell every stream, stop."""
        timeout = self._settings.drain_timeout_seconds
        give_up_at = time.monotonic() + timeout
        log.info("draining", timeout_seconds=timeout)
        engine_loop.post(Drain(timeout))
        try:
            await asyncio.wait_for(self._drained.wait(), timeout)
        except TimeoutError:
            in_time = False
            await front_ends.stop(0.0)
        else:
            in_time = await front_ends.stop(max(0.0, give_up_at - time.monotonic()))
        if not in_time:
            log.warning("drain_timed_out", timeout_seconds=timeout)
        log.info("stopped")

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
                    num_threads=settings.num_threads or _default_num_threads(settings.workers),
                    weights=None if settings.weights == "auto" else settings.weights,
                )
                stepper.warm_up()
                steppers.append(stepper)
        except ModelError as error:
            raise StartError(str(error)) from error
        return steppers


def _default_num_threads(num_workers: int) -> int:
    """A core for each process that speaks gRPC is left to it and its clients: threads that share a cell step wait for
    each other in a spin, so that with fewer cores than threads a step takes ten times as long."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - num_workers)
