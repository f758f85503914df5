"""A tick of runs in three verbs: choose which sessions step, submit them to the stepper, finish with what came back.

B rows of the tick (sessions), N tokens.
"""

import numpy as np

from cellserve_service.answers import answer_tick
from cellserve_service.core import Core
from cellserve_service.pools import ragged_indices
from cellserve_service.replay import answer_joined
from cellserve_service.run_tick import RunTick
from cellserve_service.runs import Batch, Status
from cellserve_service.scheduling import MAX_TICK_OUTPUT_BYTES, choose_sessions, leave_tick
from cellserve_service.served import ServedModel
from cellserve_service.stepping import IntArray, StepResult

# Outputs of one part of a long run: what comes on top for a reader who has ceased to read.
MAX_PART_BYTES = 65_536


def begin_run_tick(core: Core, served: ServedModel, batch: int) -> RunTick | None:
    """Choose sessions, of SINGLES or of PARTS, and submit them; None when none is ready."""
    sessions, table, specs = core.sessions, served.runs, served.specs
    rows = choose_sessions(core, served, batch)
    if not len(rows):
        return None
    runs = sessions.next_run[rows]
    asked, requests = table.asked[runs], table.requests
    spec = table.spec[runs].astype(np.int64)
    done = requests.done[asked]
    remaining = requests.num_left(asked)  # all 1 in SINGLES
    first = requests.tokens[asked] + done
    is_alike = np.count_nonzero(spec == spec[0]) == len(spec)
    ends = batch == Batch.SINGLES
    if ends:
        served.pace.note_singles(core.now)
        counts = remaining
        tokens = requests.token_pool.rows[first]
        wants = specs.wants_last[spec]
    else:
        counts = np.minimum(remaining, _part_lengths(core, served, spec))
        tokens = requests.token_pool.rows[ragged_indices(first, counts)]
        wants = np.repeat(specs.wants_every[spec], counts)
        is_last = counts == remaining
        wants[(counts.cumsum() - 1)[is_last]] = specs.wants_last[spec[is_last]]
        ends = np.count_nonzero(is_last) == len(rows)
    if served.takes_tokens:
        tokens = tokens[:, 0]
    slots = sessions.slot[rows].astype(np.int64)
    top_k = int(specs.top_k[spec[0]] if is_alike else specs.top_k[spec].max())
    ticket = served.stepper.submit(slots, counts, tokens, wants, top_k)
    _count_begun(core, served, runs, asked)
    table.status[runs] = Status.STARTED
    return RunTick(
        served=served,
        batch=batch,
        rows=rows,
        runs=runs,
        asked=asked,
        spec=spec,
        is_alike=is_alike,
        ends=ends,
        counts=counts,
        done=done + counts,
        remaining=remaining - counts,
        wants=wants,
        ticket=ticket,
        begun_at=core.now,
    )


def _count_begun(core: Core, served: ServedModel, runs: IntArray, asked: IntArray) -> None:
    statistics, table = core.statistics.models[served.index], served.runs
    statistics.batch_size.observe_one(len(runs))
    begins = table.status[runs] == Status.WAITING
    num_begins = np.count_nonzero(begins)
    if num_begins:
        begun = asked if num_begins == len(asked) else asked[begins]
        statistics.step_queue.observe(core.now - table.requests.accepted_at[begun])


def _part_lengths(core: Core, served: ServedModel, spec: IntArray) -> IntArray:
    """How many tokens each run of a tick of parts may advance at most."""
    limits, specs = core.limits, served.specs
    token_bytes = np.where(specs.is_every[spec], specs.row_bytes[spec], 1)
    in_all = min(limits.max_sliced_tick_tokens, served.pace.num_tokens(core.now))
    fair = min(limits.max_slice_tokens, max(1, in_all // len(spec)))
    within_tick = MAX_TICK_OUTPUT_BYTES // (int(token_bytes.max()) * len(spec))
    most_bytes = min(limits.max_answer_bytes, MAX_PART_BYTES)
    lengths: IntArray = np.minimum(min(fair, within_tick), most_bytes // token_bytes)
    return np.maximum(lengths, 1)


def finish_run_tick(core: Core, tick: RunTick, result: StepResult) -> None:
    """Advance positions, give out answers, hold them, and go on with the sessions."""
    sessions, served, rows, runs = core.sessions, tick.served, tick.rows, tick.runs
    leave_tick(core, served, rows)
    served.runs.requests.done[tick.asked] = tick.done
    sessions.position[rows] = sessions.position[rows] + tick.counts
    sessions.num_pending_tokens[rows] = sessions.num_pending_tokens[rows] - tick.counts.astype(np.int32)
    num_tokens = len(tick.wants)
    core.num_pending_tokens -= num_tokens
    answer_tick(core, tick, result)
    ended = rows
    if not tick.ends:
        finished = tick.remaining == 0
        ended, runs = rows[finished], runs[finished]
    _finish_runs(core, served, ended, runs)
    if core.keeping is not None:
        core.keeping.advanced(served, rows, ended)
    core.go_on(served, rows)
    statistics = core.statistics.models[served.index]
    statistics.steps_run += num_tokens
    statistics.count_tick(result, core.now - tick.begun_at)
    served.pace.took(tick.batch, num_tokens, result.compute_seconds)


def _finish_runs(core: Core, served: ServedModel, rows: IntArray, runs: IntArray) -> None:
    served.runs.finish(rows, runs)
    if core.joined:
        answer_joined(core, served, runs)
    limits = core.limits
    served.runs.release_beyond(rows, limits.max_held_answers, limits.max_held_answer_bytes // 4)
