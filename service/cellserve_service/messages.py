"""What passes between servicers and engine: commands in, events out; arrays and ids only.

A process boundary can run here. Every command, or each of its rows, belongs to a stream (a number given by the front
end) and its rows carry request numbers; every request is answered by events to that stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service.errors import Refusal
from cellserve_service.outputs import OutputArrays, OutputSpec
from cellserve_service.pools import ragged_indices, stretches
from cellserve_service.stepping import FloatArray, IntArray, TokenArray

U64Array = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class InitialState:
    """A state to begin with or to import, already checked for form: (L, state_size) at a position."""

    fingerprint: bytes
    position: int
    values: FloatArray


# Commands.


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """Open ids, or with `session_ids` None make as many new sessions as there are requests."""

    stream: int
    requests: U64Array
    model: str
    session_ids: Sequence[str] | None
    mode: OpenMode.ValueType
    durability: Durability.ValueType
    states: Sequence[InitialState] | None
    all_or_none: bool = False
    attach: bool = True
    holders: U64Array | None = None  # (n,) marks of the client; 0: none
    request_id: str = ""  # of the call; a session that it created before is its own
    request_digest: bytes = b""  # of all that was asked


@dataclass(slots=True)  # not frozen: that takes twice as long to make, and most messages make one
class SubmitRuns:
    """Runs of any streams that ask for the same outputs, addressed by handles of their stream, or (unary calls) by
    session id. Sessions whose frames were read together are decided over together.
    """

    streams: IntArray  # (n,)
    requests: U64Array  # (n,)
    handles: U64Array | None  # (n,)
    session_ids: Sequence[str] | None
    counts: IntArray  # (n,)
    tokens: TokenArray | None  # (N,)
    vectors: FloatArray | None  # (N, I)
    positions: IntArray | None  # (n,)
    timeouts_seconds: NDArray[np.float64] | None  # (n,) 0: none
    acknowledged: IntArray | None  # (n,)
    outputs: OutputSpec
    max_output_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SubmitGenerate:
    """Sampling on one session; its tokens come as Generated events."""

    stream: int
    request: int
    session_id: str
    position: int | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SessionTarget:
    """Sessions that an operation is for: handles of the stream, or ids."""

    stream: int
    requests: U64Array
    handles: U64Array | None = None
    session_ids: Sequence[str] | None = None
    request_id: str = ""  # of the call; the session remembers the last one that changed it
    request_digest: bytes = b""  # of all that was asked
    holder: int = 0  # the mark under which the caller holds the session

    def rows(self, which: slice) -> "SessionTarget":
        """Some of the sessions."""
        handles = None if self.handles is None else self.handles[which]
        session_ids = None if self.session_ids is None else self.session_ids[which]
        return replace(self, requests=self.requests[which], handles=handles, session_ids=session_ids)


@dataclass(frozen=True, slots=True)
class ResetSessions:
    target: SessionTarget


@dataclass(frozen=True, slots=True)
class DetachSessions:
    target: SessionTarget


@dataclass(frozen=True, slots=True)
class CheckpointSession:
    target: SessionTarget
    name: str


@dataclass(frozen=True, slots=True)
class RollbackSession:
    target: SessionTarget
    name: str


@dataclass(frozen=True, slots=True)
class CloseSessions:
    target: SessionTarget
    evicts: bool = False  # it is an operator who ends them


@dataclass(frozen=True, slots=True)
class ExportSession:
    target: SessionTarget


@dataclass(frozen=True, slots=True)
class ImportSession:
    target: SessionTarget
    state: InitialState


@dataclass(frozen=True, slots=True)
class ForkSession:
    target: SessionTarget
    fork_id: str | None


@dataclass(frozen=True, slots=True)
class GetSession:
    target: SessionTarget


@dataclass(frozen=True, slots=True)
class ListSessions:
    """Open sessions with an id above `after`, ordered by id."""

    stream: int
    request: int
    model: str
    after: str
    page_size: int


@dataclass(frozen=True, slots=True)
class CancelRuns:
    stream: int
    runs: U64Array


@dataclass(frozen=True, slots=True)
class Acknowledge:
    stream: int
    handles: U64Array
    positions: IntArray


@dataclass(frozen=True, slots=True)
class EndStream:
    """The stream is gone: its sessions belong to nobody, its runs that have not begun are withdrawn."""

    stream: int


@dataclass(frozen=True, slots=True)
class SetStreamPaused:
    """Whether runs of a stream rest because its reader is slow."""

    stream: int
    paused: bool


@dataclass(frozen=True, slots=True)
class StartStream:
    stream: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more; tell every stream; answer with Drained when the accepted work is done."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class StoreReply:
    """The state store has done, or not done, something that was asked of it."""

    take: Callable[[], None]


@dataclass(frozen=True, slots=True)
class StoreTrouble:
    """Why the state store does not answer; empty: it does again."""

    message: str


@dataclass(frozen=True, slots=True)
class MovedAway:
    """Another server has taken a session over, at this epoch."""

    session_id: str
    epoch: int


Command = (
    OpenSessions
    | SubmitRuns
    | SubmitGenerate
    | ResetSessions
    | CloseSessions
    | ExportSession
    | ImportSession
    | ForkSession
    | GetSession
    | ListSessions
    | CancelRuns
    | Acknowledge
    | StartStream
    | EndStream
    | SetStreamPaused
    | Drain
    | DetachSessions
    | CheckpointSession
    | RollbackSession
    | StoreReply
    | StoreTrouble
    | MovedAway
)

# Those of a stream's frames.
StreamCommand = OpenSessions | SubmitRuns | ResetSessions | CloseSessions | DetachSessions | CancelRuns | Acknowledge


# Events.


@dataclass(frozen=True, slots=True)
class Opened:
    stream: int
    requests: U64Array
    session_ids: Sequence[str]
    handles: U64Array
    positions: IntArray
    epochs: IntArray
    created: NDArray[np.bool_]
    durable_positions: IntArray | None  # None without a store
    durabilities: NDArray[np.uint8]


@dataclass(slots=True)  # not frozen: that takes twice as long to make, and most messages make one
class Answers:
    """Slices of runs that asked for the same outputs of the same model, those of one stream behind one another."""

    streams: IntArray  # (n,)
    requests: U64Array  # (n,)
    positions: IntArray  # (n,) after the slice
    counts: IntArray  # (n,) tokens in the slice
    remaining: IntArray  # (n,) tokens still to come
    outputs: OutputArrays
    num_output_rows: IntArray  # (n,)
    accepted_at: NDArray[np.float64]  # (n,) seconds of the engine's clock
    model: int  # index of the model, for metrics

    def rows(self, first: int, end: int) -> "Answers":
        """Rows first to end - 1 with their outputs."""
        before = int(self.num_output_rows[:first].sum())
        number = int(self.num_output_rows[first:end].sum())
        return self._select(slice(first, end), slice(before, before + number))

    def at(self, places: IntArray) -> "Answers":
        """The rows at some places, in this order, with their outputs."""
        starts = self.num_output_rows.cumsum() - self.num_output_rows
        return self._select(places, ragged_indices(starts[places], self.num_output_rows[places]))

    def _select(self, rows: IntArray | slice, output_rows: IntArray | slice) -> "Answers":
        return Answers(
            streams=self.streams[rows],
            requests=self.requests[rows],
            positions=self.positions[rows],
            counts=self.counts[rows],
            remaining=self.remaining[rows],
            outputs=self.outputs.select(output_rows),
            num_output_rows=self.num_output_rows[rows],
            accepted_at=self.accepted_at[rows],
            model=self.model,
        )

    def parts(self, keys: IntArray) -> Iterator["Answers"]:
        """The answers in parts of equal keys. keys: (n,) equal ones behind one another."""
        firsts, lengths = stretches(keys)
        if len(firsts) == 1:
            yield self
            return
        for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
            yield self.rows(first, first + length)


@dataclass(frozen=True, slots=True)
class Generated:
    stream: int
    request: int
    tokens: TokenArray
    logprobs: FloatArray
    position: int
    finished: bool
    stopped: bool
    seed: int


@dataclass(frozen=True, slots=True)
class DurablePositions:
    """Positions of a stream's sessions that have become safe in the state store."""

    stream: int
    handles: U64Array
    positions: IntArray


@dataclass(frozen=True, slots=True)
class Failures:
    stream: int
    requests: U64Array
    refusals: Sequence[Refusal]


@dataclass(frozen=True, slots=True)
class Done:
    """Resets, closes, detaches and marks that are done."""

    stream: int
    requests: U64Array
    handles: U64Array
    epochs: IntArray
    positions: IntArray


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The stream has lost sessions without asking."""

    stream: int
    handles: U64Array
    reason: ErrorReason.ValueType


class Tier(Enum):
    """Where a session's state is."""

    DEVICE = "device"
    HOST = "host"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """One session as it stands."""

    session_id: str
    model: str
    model_version: int
    position: int
    epoch: int
    num_pending_tokens: int
    durability: Durability.ValueType
    durable_position: int | None  # None without a store
    tier: Tier
    attached: bool
    generating: bool
    idle_seconds: float
    age_seconds: float
    marks: Sequence[tuple[str, int]] = ()  # names and positions, oldest first


@dataclass(frozen=True, slots=True)
class SessionsListed:
    stream: int
    request: int
    sessions: Sequence[SessionFacts]
    total_size: int
    more: bool


@dataclass(frozen=True, slots=True)
class StateExported:
    stream: int
    request: int
    state: InitialState


@dataclass(frozen=True, slots=True)
class SessionForked:
    stream: int
    request: int
    session_id: str
    position: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Draining:
    stream: int
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Drained:
    """All accepted work is done and answered."""

    stream: int = 0


Event = (
    Opened
    | Answers
    | Generated
    | Failures
    | Done
    | DurablePositions
    | SessionEnded
    | SessionsListed
    | StateExported
    | SessionForked
    | Draining
    | Drained
)
