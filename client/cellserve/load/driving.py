"""Drives sessions: each on its schedule, or each with its next request as soon as the last is answered."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np

from cellserve import AsyncClient, AsyncSession, ModelInfo
from cellserve.errors import CellserveError, SessionLost
from cellserve.load.mix import Mix, Work
from cellserve.load.results import LoadResult, Recorder
from cellserve.load.schedule import even_times, poisson_times

__all__ = ["Driver", "Loaded", "run_precisely"]

ResultT = TypeVar("ResultT")

_NUM_INPUTS: Final = 64  # prepared for each kind of request, and taken in turn
_BLOCK_REQUESTS: Final = 256  # drawn at once for a session without a schedule
# Within so much before its time a request is sent at once: the event loop may wake up early by its clock's resolution.
_EARLY_SECONDS: Final = 50e-6


class Loaded(Protocol):
    """What is loaded: an AsyncSession, or what a benchmark puts in its place."""

    @property
    def position(self) -> int: ...

    async def step(self, tokens: Any, /) -> object: ...

    def generate(self, max_tokens: int, /) -> AsyncIterator[int]: ...


def run_precisely(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """As asyncio.run, with timers that are right to some ten microseconds; epoll's are late by up to a millisecond."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)


class Driver:
    """Sends requests of a mix to sessions of one model.

    recorder: of the load that runs, or ran last; for whoever shows progress.
    """

    def __init__(self, client: AsyncClient, model: ModelInfo, mix: Mix, *, seed: int = 0) -> None:
        self._client = client
        self._model = model
        self._mix = mix
        self._random = np.random.default_rng(seed)
        self._inputs = {work: self._make_inputs(work) for work in mix.works}
        self.recorder = Recorder()

    async def open_sessions(self, number: int) -> list[AsyncSession]:
        """New sessions of the model, closed when the client is."""
        return await self._client.open_sessions(self._model.name, number)

    async def run(
        self,
        sessions: Sequence[Loaded],
        seconds: float,
        *,
        rate: float | None = None,
        arrivals: Literal["poisson", "even"] = "poisson",
    ) -> LoadResult:
        """Load the server for some seconds, and wait for the last answers.

        rate: requests a second of all sessions together, at times that do not depend on answers; None: each session
        sends its next request when it has the answer to the last. A refused request is counted; a session that is lost
        sends no more.
        """
        self.recorder = Recorder()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for session in sessions:
                if rate is None:
                    tasks.create_task(self._drive_closed(session, begin + seconds))
                else:
                    make_times = poisson_times if arrivals == "poisson" else even_times
                    times = make_times(rate / len(sessions), seconds, self._random).tolist()
                    works = self._mix.draw(len(times), self._random)
                    schedule = zip(times, works, strict=True)
                    tasks.create_task(self._drive_open(session, begin, schedule))
        return self.recorder.result(max(seconds, loop.time() - begin))

    async def _drive_closed(self, session: Loaded, end: float) -> None:
        loop, recorder = asyncio.get_running_loop(), self.recorder
        while True:
            for work in self._mix.draw(_BLOCK_REQUESTS, self._random):
                sent = loop.time()
                if sent >= end:
                    return
                try:
                    await self._do(session, work)
                except CellserveError as error:
                    recorder.failed(error)
                    if isinstance(error, SessionLost):
                        return
                else:
                    recorder.answered(work, loop.time() - sent)

    async def _drive_open(self, session: Loaded, begin: float, schedule: Iterator[tuple[float, Work]]) -> None:
        loop, recorder = asyncio.get_running_loop(), self.recorder
        for at, work in schedule:
            due = begin + at
            delay = due - loop.time()
            if delay > _EARLY_SECONDS:
                await asyncio.sleep(delay)
                recorder.sent_late(max(0.0, loop.time() - due))
            try:
                await self._do(session, work)
            except CellserveError as error:
                recorder.failed(error)
                if isinstance(error, SessionLost):
                    return
            else:
                recorder.answered(work, loop.time() - due)

    async def _do(self, session: Loaded, work: Work) -> None:
        inputs = self._inputs[work]
        if work.kind == "generate":
            async for _ in session.generate(work.num_tokens):
                pass
        else:
            await session.step(inputs[session.position % _NUM_INPUTS])

    def _make_inputs(self, work: Work) -> list[Any]:
        """Random tokens for steps, as the model takes them."""
        model, random, number = self._model, self._random, work.num_tokens
        if work.kind == "generate":
            return []
        if model.vocab_size is None:
            vectors = random.standard_normal((_NUM_INPUTS, number, model.input_size or 0))
            return list(vectors.astype(np.float32))
        tokens = random.integers(0, model.vocab_size, (_NUM_INPUTS, number))
        return tokens[:, 0].tolist() if number == 1 else list(tokens)
