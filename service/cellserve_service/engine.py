"""The engine: takes commands, runs ticks, and collects what has become ready. Pure but for the steppers it drives.

Its owner (engine_loop.py) gives it commands and the time, and calls `begin_tick` and `finish_tick` in turn.
"""

from collections import deque
from collections.abc import Sequence

from cellserve_service import messages
from cellserve_service.admission import Admission
from cellserve_service.cancellation import cancel, end_stream, set_paused
from cellserve_service.closing import Closing
from cellserve_service.core import Core
from cellserve_service.forking import Forking
from cellserve_service.generation import (
    GenerateTick,
    begin_generate_tick,
    finish_generate_tick,
    submit_generate,
)
from cellserve_service.keeping import Keeping
from cellserve_service.limits import EngineLimits
from cellserve_service.listing import Listing
from cellserve_service.merging import take_alike
from cellserve_service.messages import Command, Event
from cellserve_service.opening import Opening
from cellserve_service.recalling import Recalling
from cellserve_service.room import Room
from cellserve_service.run_tick import RunTick
from cellserve_service.runs import Batch
from cellserve_service.served import ServedModel
from cellserve_service.sessions import SessionTable
from cellserve_service.state_operations import StateOperations
from cellserve_service.statistics import ModelStatistics, Statistics
from cellserve_service.stepping import Stepper
from cellserve_service.store_requests import MOVED, StoreRequest
from cellserve_service.targets import split
from cellserve_service.ticks import begin_run_tick, finish_run_tick

# Of one command that is done session by session: a few milliseconds, so that no command holds up the ticks.
MAX_TURN_TARGETS = 128

Tick = RunTick | GenerateTick


class Engine:
    """Sessions of several models on one device, advanced a batch at a time."""

    def __init__(
        self,
        steppers: Sequence[Stepper],
        limits: EngineLimits,
        statistics: Statistics,
        *,
        has_store: bool = False,
        wall_offset: float = 0.0,
    ) -> None:
        sessions = SessionTable(limits.max_sessions)
        served = [ServedModel(index, stepper, sessions, limits) for index, stepper in enumerate(steppers)]
        statistics.models = [ModelStatistics() for _ in steppers]
        self.core = Core(sessions, served, limits, statistics, wall_offset=wall_offset)
        self.keeping = self.core.keeping = Keeping(self.core) if has_store else None
        self._admission = Admission(self.core)
        self._states = StateOperations(self.core)
        self._closing = Closing(self.core)
        room = Room(self.core, self._closing)
        self._opening = Opening(self.core, room)
        self._forking = Forking(self.core, room)
        self._listing = Listing(self.core)
        self._recalling = None
        if self.keeping is not None:
            self._recalling = Recalling(self.core, self.keeping, self._closing, self._forking, room, self._handle)
        self._turns = [(batch, model) for model in served for batch in Batch.ALL]
        self._turn = 0
        self._drained = False

    def handle(self, command: Command, now: float) -> None:
        """Take one command, however many turns it is worth."""
        commands = deque([command])
        while commands:
            self.handle_all(commands, now)

    def handle_all(self, commands: deque[Command], now: float) -> None:
        """Take commands off a deque, in order: all, or up to one that is too large for a turn; its rest stays there."""
        self.core.now = now
        recalling = self._recalling
        while commands:
            if isinstance(commands[0], messages.SubmitRuns):
                alike = take_alike(commands)
                here = alike if recalling is None else [runs for runs in alike if not recalling.recall(runs)]
                if here:
                    self._admission.submit(here)
                continue
            command, rest = split(commands.popleft(), MAX_TURN_TARGETS)
            if recalling is None or not recalling.recall(command):
                self._handle(command)
            if rest is not None:
                commands.appendleft(rest)
                return

    def _handle(self, command: Command) -> None:
        core = self.core
        match command:
            case messages.SubmitRuns():
                self._admission.submit([command])
            case messages.Acknowledge():
                self._admission.acknowledge(command)
            case messages.OpenSessions():
                self._opening.open(command)
            case messages.SubmitGenerate():
                submit_generate(core, command)
            case messages.ResetSessions():
                self._states.reset(command)
            case messages.CloseSessions():
                self._closing.close(command)
            case messages.ExportSession():
                self._states.export(command)
            case messages.ImportSession():
                self._states.import_state(command)
            case messages.ForkSession():
                self._forking.fork(command)
            case messages.GetSession():
                self._listing.get(command)
            case messages.ListSessions():
                self._listing.list_page(command)
            case messages.DetachSessions():
                self._states.detach(command)
            case messages.CheckpointSession():
                self._states.checkpoint(command)
            case messages.RollbackSession():
                self._states.rollback(command)
            case messages.CancelRuns():
                if self._recalling is not None:
                    self._recalling.cancel(command.stream, set(command.runs.tolist()))
                cancel(core, command)
            case messages.StartStream():
                core.streams.add(command.stream)
                self._tell_draining([command.stream])
            case messages.EndStream():
                if self._recalling is not None:
                    self._recalling.cancel(command.stream, None)
                end_stream(core, command.stream)
            case messages.SetStreamPaused():
                set_paused(core, command.stream, paused=command.paused)
            case messages.Drain():
                core.draining_until = core.now + command.timeout_seconds
                self._tell_draining(sorted(core.streams))
            case messages.StoreReply():
                command.take()
            case messages.StoreTrouble():
                assert self.keeping is not None
                self.keeping.trouble = command.message
                if not command.message:
                    core.wake_all()
            case messages.MovedAway():
                self._move_away(command)

    def _move_away(self, command: messages.MovedAway) -> None:
        sessions = self.core.sessions
        row = sessions.row_by_id.get(command.session_id)
        if self.keeping is not None and row is not None and sessions.epoch[row] < command.epoch:
            self.keeping.lose(row, MOVED)

    def _tell_draining(self, streams: Sequence[int]) -> None:
        core = self.core
        if core.draining_until is not None:
            seconds = max(0.0, core.draining_until - core.now)
            core.events += [messages.Draining(stream, seconds) for stream in streams]

    @property
    def has_work(self) -> bool:
        """Whether a tick would find something to run."""
        return any(len(served.ready[batch]) for batch, served in self._turns)

    @property
    def goes_on(self) -> bool:
        """Whether it is settled that the next tick is of longer work, so that it need not wait for single tokens."""
        for offset in range(len(self._turns)):
            batch, served = self._turns[(self._turn + offset) % len(self._turns)]
            if batch == Batch.SINGLES:
                return False
            if len(served.ready[batch]):
                return True
        return False

    def begin_tick(self, now: float) -> Tick | None:
        """Submit the next batch to its stepper; None when nothing is ready. Models and batches take turns.

        So single tokens, which somebody waits for, have a tick to themselves, which is short, and between two of them
        wait for one part of the long runs and one slice of the generates at most.
        """
        self.core.now = now
        # Twice round: what one turn withdraws for being late can be what another batch has waited for.
        for offset in range(2 * len(self._turns)):
            batch, served = self._turns[(self._turn + offset) % len(self._turns)]
            if not len(served.ready[batch]):
                continue
            tick: Tick | None
            if batch == Batch.GENERATES:
                tick = begin_generate_tick(self.core, served)
            else:
                tick = begin_run_tick(self.core, served, batch)
            if tick is not None:
                self._turn = (self._turn + offset + 1) % len(self._turns)
                return tick
        return None

    def collect(self, tick: Tick) -> object:
        """Wait for the stepper's result of a tick."""
        return tick.served.stepper.collect(tick.ticket)

    def finish_tick(self, tick: Tick, result: object, now: float) -> None:
        """Give out what came back."""
        self.core.now = now
        if isinstance(tick, RunTick):
            finish_run_tick(self.core, tick, result)  # type: ignore[arg-type]
        else:
            finish_generate_tick(self.core, tick, result)  # type: ignore[arg-type]

    def sweep(self, now: float) -> bool:
        """Housekeeping, about once a second: expire idle sessions, forget ended ones.

        Returns whether there is more of it, which the next turn is to do.
        """
        self.core.now = now
        more = self._closing.expire()
        if self.keeping is not None:
            self.keeping.shed(self.core.limits.max_parked_states)
        return more

    def begin_checkpoint(self, now: float) -> None:
        """Write every session that has changed, at its next run boundary."""
        self.core.now = now
        if self.keeping is not None:
            self.keeping.begin_checkpoint()

    def write_due(self, now: float) -> bool:
        """Copy what is due to be written, as much as a turn takes; whether there is more."""
        self.core.now = now
        return self.keeping is not None and self.keeping.write_due()

    def take_store_requests(self) -> list[StoreRequest]:
        """What the state store is asked since the last time, in order."""
        if self.keeping is None:
            return []
        requests, self.keeping.requests = self.keeping.requests, []
        return requests

    def _all_kept(self) -> bool:
        """Whether the store has every durable session as it is; begins to write those that it has not."""
        keeping = self.keeping
        if keeping is None:
            return True
        keeping.begin_checkpoint()
        while keeping.write_due():
            pass
        return not keeping.num_writing

    def take_events(self) -> list[Event]:
        """What has become ready since the last time, in order."""
        core = self.core
        if core.is_draining and not self._drained and not core.sessions.num_unfinished.any() and self._all_kept():
            self._drained = True
            core.events.append(messages.Drained())
        events, core.events = core.events, []
        return events
