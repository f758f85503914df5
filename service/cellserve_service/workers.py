"""Front ends in processes of their own: starts them, keeps them running, and passes commands and events on.

All listen on one address, and the kernel deals connections out to them. A worker that dies takes its connections along:
to the engine its streams have ended, and another worker begins.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import structlog

from cellserve_service.control import Facts, Fail, GoUnhealthy, Serve, Stop, ToWorker
from cellserve_service.errors import StartError
from cellserve_service.front import STREAM_BITS, Outlet
from cellserve_service.front_end import GRACE_SECONDS, tls_credentials, watch_loop_lag
from cellserve_service.messages import Answers, Command, Event
from cellserve_service.ports import Reservation
from cellserve_service.settings import Settings
from cellserve_service.statistics import FrontStatistics
from cellserve_service.worker_process import WorkerProcess

COUNT_SECONDS = 1.0
START_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
# A worker that has served so long did not die of how it was started.
SOUND_SECONDS = 10.0

log = structlog.get_logger()


class Workers:
    """What FrontEnd is to the server, for several of them. Reserves the address; raises StartError."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        tls_credentials(settings)
        self._reservation = Reservation(settings.listen)
        self.port = self._reservation.port
        self._loop = asyncio.get_running_loop()
        self._post: Callable[[Command], None]
        self._facts: Facts
        self._last_number = 0
        self._workers: dict[int, WorkerProcess] = {}  # by number
        self._tasks: list[asyncio.Task[None]] = []
        self._is_ending = False
        self._of_the_dead = FrontStatistics()
        self._own = FrontStatistics()

    async def prepare(self) -> None:
        """Start the processes: they are ready by the time that the models are."""
        for _ in range(self._settings.workers):
            await self._start()

    async def serve(self, outlet: Outlet, facts: Facts) -> None:
        """Let all of them serve. Raises StartError."""
        self._post, self._facts = outlet.post, facts
        workers = list(self._workers.values())
        for refusal in await asyncio.gather(*(self._begin(worker) for worker in workers)):
            if refusal is not None:
                raise StartError(refusal)
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in workers]
        self._tasks.append(asyncio.create_task(watch_loop_lag(self._own.event_loop_lag)))

    def deliver(self, events: Sequence[Event]) -> None:
        """Pass events on to the workers that have their streams."""
        for event in events:
            if isinstance(event, Answers):
                for part in event.parts(event.streams >> STREAM_BITS):
                    self._deliver(int(part.streams[0]), part)
            else:
                self._deliver(event.stream, event)

    def _deliver(self, stream: int, event: Event) -> None:
        worker = self._workers.get(stream >> STREAM_BITS)
        if worker is not None:
            worker.link.post(event)

    async def go_unhealthy(self) -> None:
        """Let health checks say NOT_SERVING from now on."""
        self._is_ending = True
        self._tell(GoUnhealthy())

    async def stop(self, patience_seconds: float) -> bool:
        """End all streams, and the processes. Returns whether every call had ended after so long."""
        return await self._end(Stop(patience_seconds), patience_seconds)

    async def fail(self) -> None:
        """The engine has failed: let everybody know who waits, and end."""
        await self._end(Fail(), 0.0)

    def statistics(self) -> FrontStatistics:
        """What all have counted. To be called on another thread than the event loop's."""
        try:
            return asyncio.run_coroutine_threadsafe(self._count(), self._loop).result(2 * COUNT_SECONDS)
        except (TimeoutError, CancelledError, RuntimeError):  # the loop is busy, as with loading models, or has ended
            return self._sum()

    async def _count(self) -> FrontStatistics:
        asked = [asyncio.create_task(worker.count()) for worker in self._workers.values()]
        if asked:
            await asyncio.wait(asked, timeout=COUNT_SECONDS)
        return self._sum()

    def _sum(self) -> FrontStatistics:
        total = FrontStatistics()
        for part in (self._of_the_dead, self._own, *(worker.counted for worker in list(self._workers.values()))):
            total.add(part)
        return total

    def _tell(self, message: ToWorker) -> None:
        for worker in self._workers.values():
            worker.link.post(message)

    async def close(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers.values():
            worker.kill()
            await worker.process.wait()
        self._reservation.close()

    async def _end(self, message: Stop | Fail, patience_seconds: float) -> bool:
        for task in self._tasks:
            task.cancel()  # whoever ends now is not to be replaced
        self._tell(message)
        workers = list(self._workers.values())
        ends = [asyncio.create_task(worker.process.wait()) for worker in workers]
        if ends:
            await asyncio.wait(ends, timeout=patience_seconds + 3 * GRACE_SECONDS)
        return all(worker.ended_in_time for worker in workers)

    async def _start(self) -> WorkerProcess:
        self._last_number += 1
        worker = WorkerProcess(self._last_number, lambda command: self._post(command))
        self._workers[worker.number] = await worker.start()
        return worker

    async def _begin(self, worker: WorkerProcess) -> str | None:
        """Let a started worker serve. Returns why it does not."""
        worker.link.post(Serve(self._settings, self._reservation.address, worker.number, self._facts))
        try:
            return await asyncio.wait_for(worker.refusal, START_SECONDS)
        except TimeoutError:
            return f"a front-end process did not begin to serve within {START_SECONDS:g} s"

    async def _keep(self, worker: WorkerProcess) -> None:
        """Put another worker in the place of this one whenever it dies."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            began_at = time.monotonic()
            await worker.is_gone.wait()
            self._bury(worker)
            log.error("worker_died", worker=worker.number, status=await worker.process.wait())
            if self._is_ending:
                return
            if time.monotonic() - began_at > SOUND_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                try:
                    worker = await self._start()
                    break
                except OSError as error:  # no memory, no more processes
                    log.error("worker_did_not_start", reason=str(error))
            refusal = await self._begin(worker)
            if refusal is None:
                log.info("worker_started", worker=worker.number)
                if self._is_ending:
                    worker.link.post(GoUnhealthy())
            else:
                log.error("worker_did_not_start", worker=worker.number, reason=refusal)
                worker.kill()

    def _bury(self, worker: WorkerProcess) -> None:
        worker.kill()  # if all that it has lost is its link
        worker.end_streams()
        del self._workers[worker.number]
        counted = worker.counted
        counted.streams = counted.stream_unsent_bytes = 0
        self._of_the_dead.add(counted)
