"""Plans a tick in numpy: which rows each step touches, and which hidden vectors the outputs need.

A tick holds B rows of one or more tokens. Rows are stepped longest first, so that step t touches a prefix of
them. The hidden vector of row r after t of its tokens is a "moment", numbered row after row: N + B of them.
Symbols: B rows, N tokens, M moments that the head runs on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellserve_model.ticks import Want

__all__ = ["Capture", "HeadPlan", "TickPlan", "TokenPlan", "plan_tick"]

Indices = NDArray[np.int64]
Places = Indices | slice

_AFTER = Want.NEXT_TOKEN | Want.TOP_K | Want.LOGITS
_HEAD = _AFTER | Want.LOGPROB


@dataclass(frozen=True, slots=True)
class Capture:
    """At one point of a tick: the ranks of the rows to remember (None: all of the step), and their places."""

    ranks: Indices | None
    places: Places


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The moments that the head runs on, in row order, and which of them each output reads.

    captures[t]: the moments after t tokens; [0] are those before the first. None: nothing is asked there.
    """

    num_moments: int
    captures: list[Capture | None]
    next_tokens: Places
    top_k: Places
    logits: Places
    logprobs: Places
    logprob_tokens: Places  # the numbers of the tokens whose log-probability is asked


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The tokens after which something is remembered. captures: as in HeadPlan; [0] is always None."""

    num_tokens: int
    captures: list[Capture | None]


@dataclass(frozen=True, slots=True)
class TickPlan:
    """order: rows, longest first; None where they stay as they are. step_sizes[t]: the rows of step t.

    token_order: the tokens' numbers step after step; None where that is the order given. head, states, gates:
    None where nobody asked.
    """

    order: Indices | None
    step_sizes: list[int]
    token_order: Indices | None
    head: HeadPlan | None
    states: TokenPlan | None
    gates: TokenPlan | None


def plan_tick(counts: Indices, wants: NDArray[np.uint8]) -> TickPlan:
    """Plan a tick. counts: (B,) int64, tokens of each row, at least 1. wants: (N,) uint8, bits of Want."""
    num_rows, num_tokens = len(counts), len(wants)
    if num_rows == num_tokens == 1 and counts[0] == 1:
        return _plan_uniform_step(1, int(wants[0]))
    if num_rows == num_tokens and np.count_nonzero((wants == wants[0]) & (counts == 1)) == num_rows:
        return _plan_uniform_step(num_rows, int(wants[0]))
    ends = np.cumsum(counts)
    if len(counts) == 0 or ends[-1] != num_tokens or counts.min() < 1:
        raise ValueError(f"counts must be at least 1 and sum to the number of tokens, {num_tokens}")
    starts = ends - counts
    num_steps = int(counts.max())
    order: Indices | None = None
    if num_steps == 1:
        step_sizes = [num_rows]
    elif num_tokens == num_steps * num_rows:
        step_sizes = [num_rows] * num_steps
    else:
        order = np.argsort(-counts, kind="stable")
        starts = starts[order]
        # How many rows have more than t tokens.
        step_sizes = (num_rows - np.searchsorted(counts[order][::-1], np.arange(num_steps), side="right")).tolist()
    token_order = None
    if num_steps > 1:
        token_order = np.concatenate([starts[:size] + step for step, size in enumerate(step_sizes)])
    moments = _Moments(starts, np.arange(num_rows) if order is None else order, step_sizes, counts)
    asked = int(np.bitwise_or.reduce(wants))
    return TickPlan(
        order=order,
        step_sizes=step_sizes,
        token_order=token_order,
        head=_plan_head(moments, wants) if asked & _HEAD else None,
        states=_plan_tokens(moments, wants & Want.STATE != 0) if asked & Want.STATE else None,
        gates=_plan_tokens(moments, wants & Want.GATES != 0) if asked & Want.GATES else None,
    )


@functools.lru_cache(maxsize=1024)
def _plan_uniform_step(num_rows: int, want: int) -> TickPlan:
    """The plan of the commonest tick, one token a row and the same outputs for all: slices, no index."""
    rows, nothing = slice(0, num_rows), slice(0, 0)
    head = None
    if want & _HEAD:
        after = rows if want & _AFTER else nothing
        before = slice(after.stop, after.stop + num_rows) if want & Want.LOGPROB else nothing
        head = HeadPlan(
            num_moments=max(after.stop, before.stop),
            captures=[
                Capture(None, before) if want & Want.LOGPROB else None,
                Capture(None, after) if want & _AFTER else None,
            ],
            next_tokens=after if want & Want.NEXT_TOKEN else nothing,
            top_k=after if want & Want.TOP_K else nothing,
            logits=after if want & Want.LOGITS else nothing,
            logprobs=before,
            logprob_tokens=rows if want & Want.LOGPROB else nothing,
        )
    tokens = TokenPlan(num_tokens=num_rows, captures=[None, Capture(None, rows)])
    return TickPlan(
        order=None,
        step_sizes=[num_rows],
        token_order=None,
        head=head,
        states=tokens if want & Want.STATE else None,
        gates=tokens if want & Want.GATES else None,
    )


class _Moments:
    """Numbers the moments of a tick, and finds those of each step."""

    def __init__(self, starts: Indices, order: Indices, step_sizes: list[int], counts: Indices) -> None:
        self.first = starts + order  # (B,) by rank: the moment before a row's first token
        self.step_sizes = step_sizes
        # (N,): the moment before each token; the one after it is one higher.
        self.before = np.arange(int(counts.sum())) + np.repeat(np.arange(len(counts)), counts)
        self.num_moments = len(self.before) + len(counts)

    def captures(self, wanted: NDArray[np.bool_]) -> list[Capture | None]:
        """What to remember before the first step (at 0) and after each; places follow the moments."""
        places = np.cumsum(wanted) - 1
        captures: list[Capture | None] = []
        for num_consumed, num_rows in enumerate([len(self.first), *self.step_sizes]):
            numbers = self.first[:num_rows] + num_consumed
            is_wanted = wanted[numbers]
            num_wanted = int(np.count_nonzero(is_wanted))
            if num_wanted == 0:
                captures.append(None)
            elif num_wanted == num_rows:
                captures.append(Capture(ranks=None, places=places[numbers]))
            else:
                captures.append(Capture(ranks=np.flatnonzero(is_wanted), places=places[numbers[is_wanted]]))
        return captures


def _plan_head(moments: _Moments, wants: NDArray[np.uint8]) -> HeadPlan:
    logprob_tokens = np.flatnonzero(wants & Want.LOGPROB)
    wanted = np.zeros(moments.num_moments, dtype=np.bool_)
    wanted[moments.before[logprob_tokens]] = True
    wanted[moments.before[wants & _AFTER != 0] + 1] = True
    places = np.cumsum(wanted) - 1
    after = places[moments.before + 1]
    return HeadPlan(
        num_moments=int(np.count_nonzero(wanted)),
        captures=moments.captures(wanted),
        next_tokens=after[wants & Want.NEXT_TOKEN != 0],
        top_k=after[wants & Want.TOP_K != 0],
        logits=after[wants & Want.LOGITS != 0],
        logprobs=places[moments.before[logprob_tokens]],
        logprob_tokens=logprob_tokens,
    )


def _plan_tokens(moments: _Moments, is_asked: NDArray[np.bool_]) -> TokenPlan:
    wanted = np.zeros(moments.num_moments, dtype=np.bool_)
    wanted[moments.before[is_asked] + 1] = True
    return TokenPlan(num_tokens=int(np.count_nonzero(is_asked)), captures=moments.captures(wanted))
