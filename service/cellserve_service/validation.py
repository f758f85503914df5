"""Checks what the runs of a command bring, before their positions count: models, lengths, tokens, outputs.

n rows of a command, N tokens in all, I input size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellserve_service.arrivals import Arrivals
from cellserve_service.core import Core
from cellserve_service.errors import Refusal, invalid
from cellserve_service.served import ServedModel
from cellserve_service.stepping import IntArray

_EMPTY = invalid("the run is empty; a run has at least one token", "counts")
_OTHER_MODEL = invalid("the rows of a run command are of sessions of one model", "handles")


def refuse(core: Core, arrivals: Arrivals, bad: NDArray[np.bool_], refusals: Refusal | Sequence[Refusal]) -> Arrivals:
    """Refuse rows, all alike or each with its own refusal; returns the others. bad: (n,)"""
    if not np.count_nonzero(bad):
        return arrivals
    if isinstance(refusals, Refusal):
        refusals = [refusals] * int(np.count_nonzero(bad))
    streams, requests = arrivals.streams[bad], arrivals.requests[bad]
    for stream in np.unique(streams).tolist():
        of_stream = np.flatnonzero(streams == stream)
        core.refuse(stream, requests[of_stream], [refusals[place] for place in of_stream.tolist()])
    return arrivals.at(np.flatnonzero(~bad))


def check_models(core: Core, arrivals: Arrivals) -> Arrivals:
    """Refuse rows that are not of the first one's model; returns the others."""
    models = core.sessions.model[arrivals.rows]
    return refuse(core, arrivals, models != models[0], _OTHER_MODEL)


def check_input(core: Core, served: ServedModel, arrivals: Arrivals) -> Arrivals:
    """Refuse rows that the model cannot take; returns the others."""
    if np.count_nonzero(arrivals.counts != 1):
        arrivals = refuse(core, arrivals, arrivals.counts < 1, _EMPTY)
        longest = core.limits.max_run_tokens
        too_long = arrivals.counts > longest
        message = "the run has {} tokens, over max_run_tokens {}"
        refusals = [invalid(message.format(count, longest), "counts") for count in arrivals.counts[too_long].tolist()]
        arrivals = refuse(core, arrivals, too_long, refusals)
    misfit = _misfit(arrivals, served)
    if misfit is not None:
        return refuse(core, arrivals, np.ones(len(arrivals), np.bool_), misfit)
    bad = _bad_tokens(arrivals, served)
    return _refuse_tokens(core, served, arrivals, bad) if np.count_nonzero(bad) else arrivals


def check_answer_size(core: Core, served: ServedModel, arrivals: Arrivals, spec: int, most: int) -> Arrivals:
    """Refuse rows whose whole answer is too large for one message; returns the others."""
    num_rows = arrivals.counts if served.specs.is_every[spec] else np.minimum(arrivals.counts, 1)
    num_bytes: IntArray = num_rows * served.specs.row_bytes[spec]
    too_large = num_bytes > most
    refusals = [
        invalid(
            f"the answer would take {of_row} bytes, over max_answer_bytes {most}; "
            "send fewer tokens, ask for fewer outputs, or use Stream",
            "outputs",
        )
        for of_row in num_bytes[too_large].tolist()
    ]
    return refuse(core, arrivals, too_large, refusals)


def _misfit(arrivals: Arrivals, served: ServedModel) -> Refusal | None:
    """Why the model can take no row: it takes the other kind of input, or vectors of another width."""
    info, tokens = served.info, arrivals.tokens
    if served.takes_tokens:
        return None if tokens.ndim == 1 else invalid(f"model {info.name} takes tokens, not vectors", "tokens")
    if tokens.ndim == 1:
        return invalid(f"model {info.name} takes vectors, not tokens", "vectors")
    if tokens.shape[1] != info.input_size:
        message = f"vectors have {tokens.shape[1]} numbers; model {info.name} takes {info.input_size}"
        return invalid(message, "vectors")
    return None


def _bad_tokens(arrivals: Arrivals, served: ServedModel) -> NDArray[np.bool_]:
    """Which tokens the model cannot take: (N,)."""
    if served.info.vocab_size is not None:
        return np.asarray(arrivals.tokens >= served.info.vocab_size)
    return np.asarray(~np.isfinite(arrivals.tokens).all(axis=1))


def _refuse_tokens(core: Core, served: ServedModel, arrivals: Arrivals, bad: NDArray[np.bool_]) -> Arrivals:
    """Refuse each row that has bad tokens for its first one. bad: (N,)"""
    starts = arrivals.counts.cumsum() - arrivals.counts
    place_of_token = np.repeat(np.arange(len(starts)), arrivals.counts)
    tokens = np.flatnonzero(bad)
    places, first = np.unique(place_of_token[tokens], return_index=True)
    refusals = []
    for place, token in zip(places.tolist(), tokens[first].tolist(), strict=True):
        where = f"at index {token - int(starts[place])} of the run"
        if served.takes_tokens:
            message = f"token {arrivals.tokens[token]} {where} is not in [0, {served.info.vocab_size})"
            refusals.append(invalid(message, "tokens"))
        else:
            refusals.append(invalid(f"the vector {where} is not finite", "vectors"))
    refused = np.zeros(len(arrivals), np.bool_)
    refused[places] = True
    return refuse(core, arrivals, refused, refusals)
