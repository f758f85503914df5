"""What is done with an open session's state beside running: reset, import, export, checkpoint, rollback, detach."""

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Operation
from cellserve_service.errors import Refusal
from cellserve_service.messages import (
    CheckpointSession,
    DetachSessions,
    ExportSession,
    ImportSession,
    InitialState,
    ResetSessions,
    RollbackSession,
    SessionTarget,
    StateExported,
)
from cellserve_service.new_sessions import check_state
from cellserve_service.sessions import NO_STREAM
from cellserve_service.stepping import FloatArray
from cellserve_service.stores.rows import LastRequest
from cellserve_service.targets import Targets, done_event

_STALE = ErrorReason.ERROR_REASON_STALE_HANDLE


class StateOperations:
    """Operations on sessions. Those that need the state wait in the session's chain for its accepted runs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._targets = Targets(core)

    def reset(self, command: ResetSessions) -> None:
        for request, row in self._targets.idle_rows(command.target, changes=True):
            self._replace(command.target, request, row, position=0, state=None)

    def import_state(self, command: ImportSession) -> None:
        for request, row in self._targets.idle_rows(command.target, changes=True):
            mismatch = check_state(self._core.model_of(row).info, command.state)
            if mismatch is not None:
                self._core.refuse(command.target.stream, [request], [mismatch])
            else:
                self._replace(command.target, request, row, command.state.position, command.state.values)

    def checkpoint(self, command: CheckpointSession) -> None:
        """Mark the state under a name, once the runs accepted before are done."""
        core, sessions = self._core, self._core.sessions
        for request, row in self._targets.idle_rows(command.target, changes=True):

            def execute(request: int = request, row: int = row) -> None:
                marks = sessions.marks.setdefault(row, {})
                marks.pop(command.name, None)
                position = int(sessions.position[row])
                marks[command.name] = (position, core.model_of(row).slots.state(row))
                while len(marks) > core.limits.max_checkpoints:
                    del marks[next(iter(marks))]
                epoch = int(sessions.epoch[row])
                self._remember(command.target, row, epoch, position)
                self._targets.answer_when_stored(
                    row, done_event(command.target.stream, request, 0, epoch, position), with_marks=True
                )

            core.when_idle(row, Operation(execute, refuse=self._targets.refuser(command.target, request)))

    def rollback(self, command: RollbackSession) -> None:
        """Go back to a marked state. The mark is looked for when it is asked for, not when the runs before are done."""
        for request, row in self._targets.idle_rows(command.target, changes=True):
            mark = self._core.sessions.marks.get(row, {}).get(command.name)
            if mark is None:
                message = f"the session has no checkpoint {command.name!r}"
                refusal = Refusal(ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND, message, field="name")
                self._refuse_missing(command.target, request, row, refusal)
            else:
                self._replace(command.target, request, row, mark[0], mark[1].copy())

    def _refuse_missing(self, target: SessionTarget, request: int, row: int, refusal: Refusal) -> None:
        """Refuse what the session lacks here. Another server may have taken it, and given it that, unnoticed so far."""
        core, keeping = self._core, self._core.keeping
        if keeping is None:
            core.refuse(target.stream, [request], [refusal])
            return
        operation = Operation(
            lambda: keeping.refuse_if_ours(row, target.stream, request, refusal),
            refuse=self._targets.refuser(target, request),
        )
        core.when_idle(row, operation)

    def _replace(self, target: SessionTarget, request: int, row: int, position: int, state: FloatArray | None) -> None:
        """Give the session another state and a new epoch. Its handles are stale at once, whenever that happens."""
        core, sessions = self._core, self._core.sessions
        owner = int(sessions.owner[row])
        core.begin_epoch(row, owner if owner == target.stream else NO_STREAM, _STALE)
        if owner != target.stream and int(sessions.holder[row]) != target.holder:
            sessions.holder[row] = 0
        handle, epoch = int(sessions.handle[row]), int(sessions.epoch[row])

        def execute() -> None:
            served = core.model_of(row)
            served.runs.forget(row)
            served.slots.replace_state(row, state)
            sessions.position[row] = position
            # Not only the epoch: what ran before may have been written since that began.
            sessions.line[row] = max(epoch, int(sessions.line[row]) + 1)
            sessions.durable_position[row] = 0
            sessions.last_used[row] = core.now
            self._remember(target, row, epoch, position)
            self._targets.answer_when_stored(row, done_event(target.stream, request, handle, epoch, position))

        core.when_idle(row, Operation(execute, position, self._targets.refuser(target, request)))

    def _remember(self, target: SessionTarget, row: int, epoch: int, position: int) -> None:
        if target.request_id:
            self._core.sessions.last_request[row] = LastRequest(target.request_id, epoch, position)

    def detach(self, command: DetachSessions) -> None:
        """Nobody holds the sessions from now on; with a store they are left to it when their runs are done."""
        core, sessions = self._core, self._core.sessions
        for request, row in self._targets.idle_rows(command.target):
            sessions.begin_epoch(row, NO_STREAM)
            core.wake(row)
            epoch = int(sessions.epoch[row])

            def execute(request: int = request, row: int = row, epoch: int = epoch) -> None:
                event = done_event(command.target.stream, request, 0, epoch, int(sessions.position[row]))
                keeping = core.keeping
                if keeping is None or not sessions.is_durable(row):
                    core.events.append(event)
                else:
                    # The next attach, wherever it is, gives a later epoch: this one is stored, too.
                    sessions.line[row] = max(int(sessions.line[row]), epoch)
                    keeping.changed(row)
                    keeping.hand_over(row, event)

            core.when_idle(row, Operation(execute, refuse=self._targets.refuser(command.target, request)))

    def export(self, command: ExportSession) -> None:
        core, stream = self._core, command.target.stream
        for request, row in self._targets.idle_rows(command.target):

            def execute(request: int = request, row: int = row) -> None:
                served = core.model_of(row)
                position = int(core.sessions.position[row])
                state = InitialState(served.info.fingerprint, position, served.slots.state(row))
                core.events.append(StateExported(stream, request, state))

            core.when_idle(row, Operation(execute, refuse=self._targets.refuser(command.target, request)))
