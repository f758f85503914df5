"""Gives out what a tick of runs brought, and holds it for repeats.

Runs that asked for the same outputs are answered together, by array operations.
B rows of the tick (sessions), N tokens, n rows of a group.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve_service.core import Core
from cellserve_service.messages import Answers
from cellserve_service.outputs import OutputArrays
from cellserve_service.pools import ragged_indices
from cellserve_service.run_tick import RunTick
from cellserve_service.runs import NOT_HELD
from cellserve_service.served import ServedModel
from cellserve_service.sessions import Durability
from cellserve_service.stepping import IntArray, StepResult, Want

# Of each array the bit of Want that brings it, as a plain number, and its name in a stepper's result.
_TOP_K = int(Want.TOP_K)
_WANT_AND_NAME: dict[str, tuple[int, str]] = {
    "next_tokens": (int(Want.NEXT_TOKEN), "next_tokens"),
    "top_tokens": (_TOP_K, "top_tokens"),
    "top_logprobs": (_TOP_K, "top_logprobs"),
    "logprobs": (int(Want.LOGPROB), "logprobs"),
    "head_outputs": (int(Want.HEAD_OUTPUT), "logits"),
    "states": (int(Want.STATE), "states"),
    "gates": (int(Want.GATES), "gates"),
}


def answer_tick(core: Core, tick: RunTick, result: StepResult) -> None:
    """Answer the runs of a tick. A run without outputs at every token is told of once, as a whole."""
    served, table, specs = tick.served, tick.served.runs, tick.served.specs
    requests = table.requests
    streams = requests.stream[tick.asked]
    apart = None if core.keeping is None else _kept_apart(core, tick)
    for places in _groups(tick, apart):
        rows = slice(None) if places is None else places
        first = 0 if places is None else int(places[0])
        runs, spec = tick.runs[rows], int(tick.spec[first])
        asked = tick.asked[rows]
        counts = tick.counts[rows] if specs.is_every[spec] else table.count[runs]
        if specs.has_outputs[spec]:
            num_rows = counts if specs.is_every[spec] else np.ones(len(runs), np.int64)
            outputs = _outputs_of(tick, result, spec, places)
            _hold(core, served, spec, runs, tick.done[rows] - counts, num_rows, outputs)
        else:
            outputs, num_rows = OutputArrays(), np.zeros_like(runs)
        of_rows = streams[rows]
        answers = Answers(
            streams=of_rows,
            requests=requests.number[asked],
            positions=table.start[runs] + tick.done[rows],
            counts=counts,
            remaining=tick.remaining[rows],
            outputs=outputs,
            num_output_rows=num_rows,
            accepted_at=requests.accepted_at[asked],
            model=served.index,
        )
        sessions_rows = tick.rows[rows]
        if np.count_nonzero(of_rows[1:] < of_rows[:-1]):
            order = of_rows.argsort(kind="stable")
            answers, sessions_rows = answers.at(order), sessions_rows[order]
        if apart is None or not apart[first]:
            core.events.append(answers)
            continue
        assert core.keeping is not None
        sessions = iter(sessions_rows.tolist())
        for of_stream in answers.parts(answers.streams):
            waiting = list(itertools.islice(sessions, len(of_stream.requests)))
            core.keeping.withholding.withhold(of_stream, waiting, of_stream.positions.tolist())


def _kept_apart(core: Core, tick: RunTick) -> IntArray | None:
    """Numbers of the groups in which answers wait to be durable: 0 for those that need not; None if none need to.

    What ended in this tick is written together, so it can wait together; a slice of a run that goes on waits alone.
    """
    waits = core.sessions.durability[tick.rows] == Durability.SYNC
    if not waits.any():
        return None
    goes_on = tick.remaining > 0
    return np.where(waits, np.where(goes_on, np.arange(2, 2 + len(waits)), 1), 0)


def _groups(tick: RunTick, apart: IntArray | None) -> Iterator[IntArray | None]:
    """Places of equal spec among those that have something to tell, in their order; None for all of the tick.

    apart: places of different numbers go into different groups.
    """
    spec, is_every = tick.spec, tick.served.specs.is_every
    if apart is None:
        if tick.is_alike and (tick.ends or is_every[spec[0]]):
            yield None
            return
        apart = np.zeros_like(spec)
    places = np.flatnonzero(is_every[spec] | (tick.remaining == 0))
    order = places[np.lexsort((apart[places], spec[places]))]
    changes = (spec[order[1:]] != spec[order[:-1]]) | (apart[order[1:]] != apart[order[:-1]])
    for group in np.split(order, np.flatnonzero(changes) + 1):
        if len(group):
            yield group


def _outputs_of(tick: RunTick, result: StepResult, spec: int, places: IntArray | None) -> OutputArrays:
    """The outputs of some rows of the tick, which all asked for the same; places None: of all rows."""
    specs = tick.served.specs
    top_k = int(specs.top_k[spec])
    of_places: NDArray[np.bool_] | None = None  # (N,) tokens
    if places is not None:
        is_meant = np.zeros(len(tick.rows), np.bool_)
        is_meant[places] = True
        of_places = np.repeat(is_meant, tick.counts)
    arrays: dict[str, Any] = {}
    for name, *_ in specs.layouts[spec].arrays:
        want, of_result = _WANT_AND_NAME[name]
        array = getattr(result, of_result)
        if of_places is not None:
            # The result has one row for each token that wanted this.
            array = array[of_places[(tick.wants & want) != 0]]
        arrays[name] = array[:, :top_k] if want == _TOP_K else array
    return OutputArrays(**arrays)


def _hold(
    core: Core,
    served: ServedModel,
    spec: int,
    runs: IntArray,  # (n,)
    first: IntArray,  # (n,) the output row of its run with which the outputs begin
    num_rows: IntArray,  # (n,)
    outputs: OutputArrays,
) -> None:
    """Copy outputs to the pool of held answers, for runs whose whole answer is not too large."""
    table, layout, most = served.runs, served.specs.layouts[spec], core.limits.max_held_answer_bytes // 4
    row_words = layout.row_words
    if not served.specs.is_every[spec]:
        # A row each, and that is the answer.
        if row_words <= most:
            layout.pack(outputs, table.hold(runs, row_words).reshape(-1, row_words))
        return
    in_all = table.count[runs]
    words = in_all * row_words
    begins = (first == 0) & (words <= most)
    if np.count_nonzero(begins & (in_all == num_rows)) == len(runs):
        # Whole answers, one after the other: they lie together.
        layout.pack(outputs, table.hold(runs, words).reshape(-1, row_words))
        return
    if np.count_nonzero(begins):
        table.hold(runs[begins], words[begins])
    held = table.held[runs] != NOT_HELD
    packed = np.empty((int(num_rows.sum()), row_words), np.uint32)
    layout.pack(outputs, packed)
    packed = packed[np.repeat(held, num_rows)]
    starts, num_rows = table.held[runs[held]] + first[held] * row_words, num_rows[held]
    places = np.repeat(starts, num_rows) + row_words * ragged_indices(np.zeros_like(num_rows), num_rows)
    table.held_pool.rows[places[:, None] + np.arange(row_words), 0] = packed
