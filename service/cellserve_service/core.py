"""The engine's state and the few moves that its parts share: answer, refuse, withdraw, go on with a session.

One thread owns all of it. Time comes in from outside as `now`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import Answers, Event, Failures, Generated, SessionEnded, SubmitGenerate
from cellserve_service.runs import Batch, Kind, Status
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_RUN, NO_STREAM, SessionTable, Stage
from cellserve_service.statistics import Statistics
from cellserve_service.stepping import IntArray

if TYPE_CHECKING:
    from cellserve_service.keeping import Keeping


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that waits in a session's chain for the runs before it. `position` is what it sets, if it does.

    `refuse` is called in place of `execute` where the session is lost before; None: it is done all the same.
    """

    execute: Callable[[], None]
    position: int | None = None
    refuse: Callable[[Refusal], None] | None = None


@dataclass(frozen=True, slots=True)
class JoinedRequest:
    """A repeat of a run that had not finished; the run's answer is for this request too."""

    stream: int
    request: int
    accepted_at: float
    deadline: float


@dataclass(slots=True)
class Generation:
    """A Generate under way on a session. `run` is its entry in the session's chain."""

    command: SubmitGenerate
    run: int
    remaining: int
    digest: int
    last_token_at: float | None = None
    # Set while the session is in a tick: what becomes of the generate afterwards.
    broken_off: Refusal | None = None
    is_lost: bool = False  # the session is another server's: what was sampled is nobody's
    successor: SubmitGenerate | None = None


@dataclass(slots=True)
class Core:
    """Sessions, models, and what has become ready for the servicers."""

    sessions: SessionTable
    served: Sequence[ServedModel]
    limits: EngineLimits
    statistics: Statistics
    events: list[Event] = field(default_factory=list)
    now: float = 0.0
    draining_until: float | None = None
    num_pending_tokens: int = 0
    wall_offset: float = 0.0  # what the wall clock is ahead of `now`
    streams: set[int] = field(default_factory=set)
    paused_streams: set[int] = field(default_factory=set)
    # By (model index, run).
    operations: dict[tuple[int, int], Operation] = field(default_factory=dict)
    joined: dict[tuple[int, int], list[JoinedRequest]] = field(default_factory=dict)
    # By session row.
    generations: dict[int, Generation] = field(default_factory=dict)
    # By id of a durable session that is closed and still finishes what it had accepted: what waits for its end.
    closing: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    # None: there is no state store.
    keeping: Keeping | None = None

    @property
    def is_draining(self) -> bool:
        return self.draining_until is not None

    def model_of(self, row: int) -> ServedModel:
        return self.served[int(self.sessions.model[row])]

    def model_named(self, name: str) -> ServedModel | None:
        return next((served for served in self.served if served.info.name == name), None)

    def refuse(self, stream: int, requests: NDArray[np.uint64] | Sequence[int], refusals: Sequence[Refusal]) -> None:
        """Answer requests with refusals, one for each."""
        self.statistics.count_failures(refusals)
        self.events.append(Failures(stream, np.asarray(requests, np.uint64), tuple(refusals)))

    def give(self, row: int, position: int, event: Answers | Generated) -> None:
        """Give out an answer of one session, when its state is durable up to the position if it must be."""
        if self.keeping is None or self.keeping.withholding.may_leave(row, position):
            self.events.append(event)
        else:
            self.keeping.withholding.withhold(event, [row], [position])

    def refuse_in_turn(self, row: int, stream: int, request: int, refusal: Refusal) -> None:
        """Refuse a request of which parts were answered before: behind those, if they still wait to be durable."""
        if self.keeping is None:
            self.refuse(stream, [request], [refusal])
        else:
            self.keeping.withholding.refuse_in_turn(row, stream, request, refusal)

    def go_on(self, served: ServedModel, rows: IntArray) -> None:
        """Queue sessions whose first unfinished run can be taken by a tick; do the operations that are due."""
        sessions = self.sessions
        rows = rows[(sessions.next_run[rows] != NO_RUN) & (sessions.stage[rows] == Stage.IDLE)]
        if self.keeping is not None:
            rows = self.keeping.fetch_states(served, rows)
        if not len(rows):
            return
        kinds = served.runs.kind[sessions.next_run[rows]]
        if np.count_nonzero(kinds):
            for row in rows[kinds == Kind.OPERATION].tolist():
                self._do_operations(served, row)
            rows = rows[sessions.next_run[rows] != NO_RUN]
            kinds = served.runs.kind[sessions.next_run[rows]]
            self._queue(served, Batch.GENERATES, rows[kinds == Kind.GENERATE])
            rows = rows[kinds == Kind.RUN]
        is_long = served.runs.are_long(sessions.next_run[rows])
        if np.count_nonzero(is_long):
            self._queue(served, Batch.PARTS, rows[is_long])
            rows = rows[~is_long]
        self._queue(served, Batch.SINGLES, rows)

    def go_on_with(self, row: int) -> None:
        """The same for one session."""
        if self.sessions.next_run[row] != NO_RUN and self.sessions.stage[row] == Stage.IDLE:
            self.go_on(self.model_of(row), np.array([row], np.int64))

    def _queue(self, served: ServedModel, batch: int, rows: IntArray) -> None:
        self.sessions.stage[rows] = Stage.READY
        served.ready[batch].push(rows)

    def _do_operations(self, served: ServedModel, row: int) -> None:
        """Do operations until a session's next run is one for a tick. Operations do not go on with the session."""
        runs = served.runs
        while (run := int(self.sessions.next_run[row])) != NO_RUN and runs.kind[run] == Kind.OPERATION:
            operation = self.operations.pop((served.index, run))
            runs.remove_first(row)
            operation.execute()

    def when_idle(self, row: int, operation: Operation) -> None:
        """Do an operation as soon as the session's accepted runs are done: now, if there are none."""
        sessions = self.sessions
        if operation.position is not None:
            sessions.accepted[row] = operation.position
        if sessions.next_run[row] == NO_RUN and not sessions.is_in_store[row]:
            operation.execute()
            return
        served = self.model_of(row)
        runs = served.runs.allocate(1, Kind.OPERATION)
        served.runs.session[runs] = row
        self.operations[served.index, int(runs[0])] = operation
        served.runs.append(np.array([row], np.int64), runs)
        if sessions.is_in_store[row]:
            self.go_on_with(row)

    def awaits_replacement(self, row: int) -> bool:
        """Whether something waits in the session's chain to give it another state."""
        served = self.model_of(row)
        operations = (self.operations.get((served.index, run)) for run in served.runs.unfinished(row))
        return any(operation is not None and operation.position is not None for operation in operations)

    def refuse_operations(self, row: int, refusal: Refusal) -> None:
        """Take the operations that wait in a session's chain, and can be refused, out of it."""
        served = self.model_of(row)
        runs = served.runs
        refused = [
            run
            for run in runs.unfinished(row)
            if runs.kind[run] == Kind.OPERATION and self.operations[served.index, run].refuse is not None
        ]
        operations = [self.operations.pop((served.index, run)) for run in refused]
        if refused:
            runs.remove(row, refused)
        for operation in operations:
            assert operation.refuse is not None
            operation.refuse(refusal)

    def begin_epoch(self, row: int, stream: int, reason: ErrorReason.ValueType, epoch: int = 0) -> None:
        """Make the session's handles stale and give it to a stream; the one that loses it is told the reason."""
        sessions, owner = self.sessions, int(self.sessions.owner[row])
        if owner not in (NO_STREAM, stream):
            self.tell_owner(row, reason)
            if reason == ErrorReason.ERROR_REASON_SESSION_MOVED:
                sessions.remember_moved(row)
        sessions.begin_epoch(row, stream, epoch)
        self.wake(row)

    def tell_owner(self, row: int, reason: ErrorReason.ValueType) -> None:
        """Tell the stream that holds a session, if there is one, that it loses it."""
        owner = int(self.sessions.owner[row])
        if owner != NO_STREAM:
            handles = self.sessions.handle[row : row + 1].copy()
            self.events.append(SessionEnded(owner, handles, reason))

    def tell_owners(self, rows: IntArray, reason: ErrorReason.ValueType) -> None:
        """The same for the streams that hold some sessions."""
        owners = self.sessions.owner[rows]
        for owner in np.unique(owners[owners != NO_STREAM]).tolist():
            handles = self.sessions.handle[rows[owners == owner]]
            self.events.append(SessionEnded(owner, handles, reason))

    def wake(self, row: int) -> None:
        """Let a session go on that may have rested for a slow reader who does not matter any more."""
        if self.sessions.stage[row] == Stage.RESTING:
            self.sessions.stage[row] = Stage.IDLE
            self.go_on_with(row)

    def wake_all(self) -> None:
        """The same for all sessions; those that still have to rest will."""
        for row in np.flatnonzero(self.sessions.stage == Stage.RESTING).tolist():
            self.wake(row)

    def withdraw(self, row: int, victims: Mapping[int, Refusal]) -> None:
        """Take runs that have not begun out of a session; the runs that counted on them are refused as a gap."""
        if not victims:
            return
        sessions, served = self.sessions, self.model_of(row)
        runs = served.runs
        removed: dict[int, Refusal | None] = {}
        position = int(sessions.position[row])
        gap = False
        for run in runs.unfinished(row):
            if runs.kind[run] == Kind.OPERATION:
                sets = self.operations[served.index, run].position
                if sets is not None:
                    position, gap = sets, False
            elif run in victims:
                removed[run] = victims[run]
                gap = True
            elif gap:
                removed[run] = None
            elif runs.kind[run] == Kind.RUN:
                position = int(runs.start[run] + runs.count[run])
        assert removed.keys() >= victims.keys()
        sessions.accepted[row] = position
        gone = Refusal(
            ErrorReason.ERROR_REASON_POSITION_GAP,
            "a run before this one was withdrawn; send again from the session's position",
            position=position,
        )
        for run, refusal in removed.items():
            self._refuse_removed(served, row, run, refusal or gone)
        first = int(sessions.next_run[row])
        if first in removed:
            if sessions.stage[row] == Stage.READY:
                served.ready[runs.batch_of(first)].remove(row)
            if sessions.stage[row] != Stage.LOADING:
                sessions.stage[row] = Stage.IDLE
        runs.remove(row, removed)
        self.go_on_with(row)

    def _refuse_removed(self, served: ServedModel, row: int, run: int, refusal: Refusal) -> None:
        runs = served.runs
        if runs.kind[run] == Kind.GENERATE:
            self.end_generation(row)
            self.refuse_in_turn(row, *runs.request_of(run), refusal)
            return
        assert runs.status[run] == Status.WAITING
        self._count_pending(row, -int(runs.count[run]))
        stream, request = runs.request_of(run)
        self.refuse(stream, [request], [refusal])
        for joined in self.joined.pop((served.index, run), ()):
            self.refuse(joined.stream, [joined.request], [refusal])

    def _count_pending(self, row: int, num_tokens: int) -> None:
        self.sessions.num_pending_tokens[row] += num_tokens
        self.num_pending_tokens += num_tokens

    def give_up(self, row: int, refusals: Mapping[int, Refusal]) -> None:
        """The callers of runs that have not begun want them no more.

        A run that somebody else has joined goes on for that one; the others are withdrawn.
        """
        served = self.model_of(row)
        victims = {run: refusal for run, refusal in refusals.items() if not self._hand_over(served, run, refusal)}
        self.withdraw(row, victims)
        # What was handed over does not rest for the caller who gave it up.
        self.wake(row)
        self.go_on_with(row)

    def _hand_over(self, served: ServedModel, run: int, refusal: Refusal) -> bool:
        joined = self.joined.get((served.index, run))
        if not joined:
            return False
        runs = served.runs
        stream, request = runs.request_of(run)
        self.refuse(stream, [request], [refusal])
        heir = joined.pop(0)
        requests, asked = runs.requests, runs.asked[run]
        requests.stream[asked] = heir.stream
        requests.number[asked] = heir.request
        requests.accepted_at[asked] = heir.accepted_at
        requests.deadline[asked] = heir.deadline
        return True

    def waiting_runs(self, row: int) -> list[int]:
        """The runs of a session that have not begun."""
        runs = self.model_of(row).runs
        return [
            run for run in runs.unfinished(row) if runs.kind[run] == Kind.RUN and runs.status[run] == Status.WAITING
        ]

    def break_off_generation(self, row: int, refusal: Refusal) -> None:
        """Stop the session's generate, if there is one: now, or after the tick that the session is in."""
        generation = self.generations.get(row)
        if generation is None:
            return
        if generation.successor is not None:
            self.refuse(generation.successor.stream, [generation.successor.request], [refusal])
            generation.successor = None
        if self.is_sampling(row):
            generation.broken_off = generation.broken_off or refusal
        else:
            self.withdraw(row, {generation.run: refusal})

    def is_sampling(self, row: int) -> bool:
        """Whether the session is in a tick of its generate."""
        generation = self.generations.get(row)
        return (
            generation is not None
            and self.sessions.stage[row] == Stage.IN_TICK
            and self.sessions.next_run[row] == generation.run
        )

    def end_generation(self, row: int) -> None:
        del self.generations[row]
        self.sessions.is_generating[row] = False
