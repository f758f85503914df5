"""Answers repeats: a run that has run is not run again; its held answer is given, or the repeat joins it."""

from collections.abc import Iterable

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, JoinedRequest
from cellserve_service.errors import Refusal
from cellserve_service.messages import Answers
from cellserve_service.outputs import OutputArrays
from cellserve_service.runs import NOT_HELD, Kind, Status
from cellserve_service.served import ServedModel

# Repeats of one run that wait for its answer.
MAX_JOINED = 64


def since_last_reset(core: Core, served: ServedModel, row: int) -> Iterable[int]:
    """The chain of a session behind the last operation that waits there to set its position.

    Positions count anew from there, and a run before it is no longer the one at its position.
    """
    chain = list(served.runs.chain(row))
    for place in range(len(chain) - 1, -1, -1):
        operation = core.operations.get((served.index, chain[place]))
        if operation is not None and operation.position is not None:
            return chain[place + 1 :]
    return chain


def replay(
    core: Core,
    served: ServedModel,
    row: int,
    position: int,
    count: int,
    digest: int,
    spec: int,
    asked: JoinedRequest,
) -> Refusal | None:
    """Answer the repeat of a run of `count` tokens at `position`, or say why it cannot be answered."""
    runs = served.runs
    accepted = int(core.sessions.accepted[row])
    for run in since_last_reset(core, served, row):
        if runs.kind[run] != Kind.RUN or runs.start[run] != position or runs.count[run] != count:
            continue
        if int(runs.digest[run]) != digest:
            return Refusal(
                ErrorReason.ERROR_REASON_POSITION_CONFLICT,
                f"other tokens have run at position {position}",
                position=accepted,
                field="positions",
            )
        if int(runs.spec[run]) != spec:
            return _not_held(accepted, "other outputs are asked than the run was answered with")
        refusal = (
            answer_held(core, served, run, asked)
            if runs.status[run] == Status.HELD
            else _join(core, served, run, asked)
        )
        core.statistics.runs_deduplicated += refusal is None
        return refusal
    return _not_held(accepted, f"the answer of the run at position {position} is no longer held")


def _join(core: Core, served: ServedModel, run: int, asked: JoinedRequest) -> Refusal | None:
    joined = core.joined.setdefault((served.index, run), [])
    if len(joined) >= MAX_JOINED:
        return Refusal(ErrorReason.ERROR_REASON_QUEUE_FULL, f"{MAX_JOINED} repeats wait for this run's answer already")
    joined.append(asked)
    return None


def answer_held(core: Core, served: ServedModel, run: int, asked: JoinedRequest) -> Refusal | None:
    """Give the held answer of a finished run, in slices if it is long, or say that it was not kept."""
    runs, specs = served.runs, served.specs
    spec, start, count = int(runs.spec[run]), int(runs.start[run]), int(runs.count[run])
    row = int(runs.session[run])
    if specs.has_outputs[spec] and runs.held[run] == NOT_HELD:
        accepted = int(core.sessions.accepted[row])
        return _not_held(accepted, "the answer was larger than max_held_answer_bytes")
    in_slices = specs.has_outputs[spec] and specs.is_every[spec]
    layout = specs.layouts[spec]
    slice_tokens = count
    if in_slices:
        slice_tokens = max(1, core.limits.max_answer_bytes // int(specs.row_bytes[spec]))
    words = runs.held_answer(run).reshape(-1, layout.row_words) if specs.has_outputs[spec] else None
    for first in range(0, count, slice_tokens):
        end = min(count, first + slice_tokens)
        rows = words if not in_slices or words is None else words[first:end]
        core.give(
            row,
            start + count,
            Answers(
                streams=np.array([asked.stream]),
                requests=np.array([asked.request], np.uint64),
                positions=np.array([start + end]),
                counts=np.array([end - first]),
                remaining=np.array([count - end]),
                outputs=OutputArrays() if rows is None else layout.unpack(rows),
                num_output_rows=np.array([0 if rows is None else len(rows)]),
                accepted_at=np.array([asked.accepted_at]),
                model=served.index,
            ),
        )
    return None


def _not_held(position: int, message: str) -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_ANSWER_NOT_HELD, message, position=position, field="positions")


def answer_joined(core: Core, served: ServedModel, runs: Iterable[int]) -> None:
    """Answer the repeats that have joined runs which are now finished."""
    for run in runs:
        for asked in core.joined.pop((served.index, int(run)), ()):
            refusal = answer_held(core, served, int(run), asked)
            if refusal is not None:
                core.refuse(asked.stream, [asked.request], [refusal])
