"""Withdraws what callers no longer want: runs that they cancel, and all runs of streams that have ended."""

from collections import defaultdict

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.messages import CancelRuns
from cellserve_service.runs import Kind, Status
from cellserve_service.served import ServedModel
from cellserve_service.sessions import Stage

_CANCELLED = Refusal(ErrorReason.ERROR_REASON_RUN_CANCELLED, "the caller withdrew it")
_STREAM_ENDED = Refusal(ErrorReason.ERROR_REASON_RUN_CANCELLED, "its stream has ended")


def cancel(core: Core, command: CancelRuns) -> None:
    """Withdraw runs that have not begun, and break off generates; what has begun is left alone."""
    _withdraw(core, command.stream, set(command.runs.tolist()), _CANCELLED)


def end_stream(core: Core, stream: int) -> None:
    """A stream is gone: withdraw its runs that have not begun; its sessions belong to nobody."""
    core.streams.discard(stream)
    core.sessions.release_stream(stream)
    _withdraw(core, stream, None, _STREAM_ENDED)
    set_paused(core, stream, paused=False)


def set_paused(core: Core, stream: int, *, paused: bool) -> None:
    """Let the sessions that a stream holds, and the generates that it asked for, rest while it is a slow reader."""
    if paused:
        core.paused_streams.add(stream)
        return
    core.paused_streams.discard(stream)
    sessions = core.sessions
    resting = np.flatnonzero(sessions.stage == Stage.RESTING)
    for served in core.served:
        rows = resting[sessions.model[resting] == served.index]
        asked = served.runs.asked[sessions.next_run[rows]]
        rows = rows[served.runs.requests.stream[asked] == stream]
        sessions.stage[rows] = Stage.IDLE
        core.go_on(served, rows)


def _withdraw(core: Core, stream: int, requests: set[int] | None, refusal: Refusal) -> None:
    """Withdraw a stream's requests, all or some, as far as they have not begun."""

    def is_meant(other: int, request: int) -> bool:
        return other == stream and (requests is None or request in requests)

    for (model, run), joined in core.joined.items():
        if core.served[model].runs.status[run] == Status.WAITING:
            for asked in [asked for asked in joined if is_meant(asked.stream, asked.request)]:
                joined.remove(asked)
                core.refuse(stream, [asked.request], [refusal])
    for row, generation in list(core.generations.items()):
        successor = generation.successor
        if successor is not None and is_meant(successor.stream, successor.request):
            generation.successor = None
            core.refuse(stream, [successor.request], [refusal])
        elif successor is None and is_meant(generation.command.stream, generation.command.request):
            core.break_off_generation(row, refusal)
    for served in core.served:
        for row, runs in _waiting_runs(served, stream, requests).items():
            core.give_up(row, dict.fromkeys(runs, refusal))


def _waiting_runs(served: ServedModel, stream: int, requests: set[int] | None) -> dict[int, list[int]]:
    """A stream's runs that have not begun, all or those of some requests, by session row."""
    table = served.runs
    asked = table.requests.of_stream(stream)
    if requests is not None:
        asked = asked[np.isin(table.requests.number[asked], np.fromiter(requests, np.uint64, len(requests)))]
    runs = np.sort(table.requests.run[asked])
    runs = runs[(table.status[runs] == Status.WAITING) & (table.kind[runs] == Kind.RUN)]
    by_row: dict[int, list[int]] = defaultdict(list)
    for run, row in zip(runs.tolist(), table.session[runs].tolist(), strict=True):
        by_row[row].append(run)
    return by_row
