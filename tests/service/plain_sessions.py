"""The sessions that the engine must behave like: one object a session, one a run, no arrays.

Here: what a session is. plain_lifecycle.py opens and ends them, plain_service.py lets them run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cellserve_service.messages import SubmitGenerate
from cellserve_service.outputs import OutputSpec
from cellserve_service.stepping import FloatArray
from tests.service.records import OutputRow
from tests.support.steppers import FakeModel

__all__ = [
    "Grip",
    "Held",
    "PlainGenerate",
    "PlainOperation",
    "PlainRun",
    "PlainSession",
    "Repeat",
    "Tokens",
    "settings_of",
]

Tokens = tuple[object, ...]  # ids, or vectors as tuples


@dataclass(eq=False)
class Grip:
    """A handle: what a stream holds of a session for one epoch. Its number is known once it has been told."""

    session: PlainSession
    stream: int
    handle: int | None = None
    moved: bool = False  # lost to another stream


@dataclass(frozen=True)
class Repeat:
    """A request that has joined a run which it repeats."""

    stream: int
    request: int
    deadline: float


@dataclass(eq=False)
class PlainRun:
    stream: int
    request: int
    start: int
    tokens: Tokens
    spec: OutputSpec
    deadline: float
    rows: list[OutputRow] = field(default_factory=list)
    begun: bool = False
    done: int = 0
    joined: list[Repeat] = field(default_factory=list)


@dataclass(eq=False)
class PlainGenerate:
    command: SubmitGenerate
    remaining: int
    broken_off: str | None = None
    successor: SubmitGenerate | None = None


@dataclass(eq=False)
class PlainOperation:
    act: Callable[[], None]
    position: int | None = None


@dataclass(eq=False)
class Held:
    """A finished run's answer, or a slice of a generate's tokens."""

    start: int
    count: int
    run: PlainRun | None = None
    words: int = 0  # 0: the answer itself was too large, or there was none
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    settings: tuple[object, ...] = ()


@dataclass(eq=False)
class PlainSession:
    id: str
    model: FakeModel
    row: int
    state: FloatArray
    position: int
    accepted: int
    last_used: float
    grip: Grip | None = None  # what the stream that holds it has
    owner: int = 0
    epoch: int = 1
    chain: list[PlainRun | PlainGenerate | PlainOperation] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    in_tick: bool = False
    ended: bool = False

    @property
    def generate(self) -> PlainGenerate | None:
        return next((entry for entry in self.chain if isinstance(entry, PlainGenerate)), None)

    @property
    def num_pending(self) -> int:
        return sum(len(entry.tokens) - entry.done for entry in self.chain if isinstance(entry, PlainRun))

    def since_last_reset(self) -> list[Held | PlainRun | PlainGenerate | PlainOperation]:
        """What has run and will run at positions as they are counted after all that is accepted."""
        everything = [*self.held, *self.chain]
        for place in range(len(everything) - 1, -1, -1):
            entry = everything[place]
            if isinstance(entry, PlainOperation) and entry.position is not None:
                return everything[place + 1 :]
        return everything


def settings_of(command: SubmitGenerate) -> tuple[object, ...]:
    return command.temperature, command.top_k, command.top_p, command.seed, command.stop_tokens
