"""Chooses which sessions form the next batch: whatever is ready, oldest first, as far as slots and bounds go."""

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.runs import Batch, Status
from cellserve_service.served import ServedModel
from cellserve_service.sessions import Durability, Stage
from cellserve_service.stepping import IntArray

# Outputs of one tick in all: bounds what a tick of wide outputs takes in memory.
MAX_TICK_OUTPUT_BYTES = 64 << 20

_LATE = Refusal(ErrorReason.ERROR_REASON_RUN_TIMED_OUT, "the run's timeout passed before it began")


def choose_sessions(core: Core, served: ServedModel, batch: int) -> IntArray:
    """The sessions that have waited longest, resident on the device and marked as being in a tick."""
    sessions, queue = core.sessions, served.ready[batch]
    chosen: list[IntArray] = []
    room = served.num_room(batch)
    while room > 0 and len(queue):
        rows = queue.pop(room)
        sessions.stage[rows] = Stage.IDLE
        rows = _without_late(core, served, _without_resting(core, served, rows, batch))
        sessions.stage[rows] = Stage.IN_TICK
        room -= len(rows)
        chosen.append(rows)
    served.pace.num_left[batch] = len(queue)
    if not chosen:
        return np.empty(0, np.int64)
    rows = chosen[0] if len(chosen) == 1 else np.concatenate(chosen)
    if batch != Batch.GENERATES and len(rows):
        rows = _within_output_bytes(core, served, rows, batch)
    served.slots.make_resident(rows)
    served.num_in_ticks += len(rows)
    return rows


def leave_tick(core: Core, served: ServedModel, rows: IntArray) -> None:
    """The sessions' tick is over."""
    served.num_in_ticks -= len(rows)
    core.sessions.stage[rows] = Stage.IDLE
    core.sessions.last_used[rows] = core.now


def _without_resting(core: Core, served: ServedModel, rows: IntArray, batch: int) -> IntArray:
    """Let sessions rest whose answers are not read, or cannot leave; returns the others."""
    sessions = core.sessions
    if batch == Batch.GENERATES and core.keeping is not None and core.keeping.trouble:
        # What these sample could not leave, and would have to wait here.
        waits = sessions.durability[rows] == Durability.SYNC
        sessions.stage[rows[waits]] = Stage.RESTING
        rows = rows[~waits]
    if not core.paused_streams:
        return rows
    streams = served.runs.requests.stream[served.runs.asked[sessions.next_run[rows]]]
    resting = np.isin(streams, list(core.paused_streams))
    if batch != Batch.GENERATES:
        # What an earlier holder left behind rests for nobody: the session's new holder waits for it.
        resting &= sessions.owner[rows] == streams
    sessions.stage[rows[resting]] = Stage.RESTING
    return rows[~resting]


def _without_late(core: Core, served: ServedModel, rows: IntArray) -> IntArray:
    """Withdraw runs whose time to begin is over; returns the sessions that are still to be stepped."""
    runs = core.sessions.next_run[rows]
    late = served.runs.requests.deadline[served.runs.asked[runs]] < core.now
    if not np.count_nonzero(late):
        return rows
    late &= served.runs.status[runs] == Status.WAITING
    for row, run in zip(rows[late].tolist(), runs[late].tolist(), strict=True):
        core.give_up(row, {run: _LATE})
    in_time: IntArray = rows[~late]
    return in_time


def _within_output_bytes(core: Core, served: ServedModel, rows: IntArray, batch: int) -> IntArray:
    """As many sessions as may have outputs in one tick; the others go back to where they stood."""
    specs = served.specs
    if specs.max_row_bytes * len(rows) <= MAX_TICK_OUTPUT_BYTES:
        return rows
    row_bytes = specs.row_bytes[served.runs.spec[core.sessions.next_run[rows]]]
    if int(row_bytes.max()) * len(rows) <= MAX_TICK_OUTPUT_BYTES:
        return rows
    number = max(1, int(np.searchsorted(row_bytes.cumsum(), MAX_TICK_OUTPUT_BYTES, side="right")))
    core.sessions.stage[rows[number:]] = Stage.READY
    served.ready[batch].push_front(rows[number:])
    return rows[:number]
