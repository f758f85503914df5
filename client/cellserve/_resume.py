"""Decides what a session that was attached again needs, so that its callers notice nothing but time.

Positions: P is where the server says that the session stands, consumed and accepted; C is where its answers say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cellserve.errors import TokensLost

__all__ = ["ResumePlan", "UnansweredRun", "plan_resume"]


@dataclass(frozen=True, slots=True)
class UnansweredRun:
    """A run that was asked for and has no answer, from position begin to position end.

    is_waited_for: whether somebody waits for its answer. will_be_repeated: whether its caller was told to try again
    later, so that the position must be left where the repeat begins.
    """

    begin: int
    end: int
    is_waited_for: bool = True
    will_be_repeated: bool = False


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """replays: whether the kept tokens from P to C run again, before anything else. num_runs: how many of the
    unanswered runs, the first ones, are sent again; the others are settled: those waited for are refused as a gap.
    """

    replays: bool
    num_runs: int


def plan_resume(
    position: int, confirmed: int, kept_start: int | None, runs: Sequence[UnansweredRun], session_id: str
) -> ResumePlan:
    """The plan for P, C, the position of the oldest kept token, and the unanswered runs in their order.

    Raises TokensLost where the session cannot be made whole.
    """
    if position < confirmed and (kept_start is None or position < kept_start):
        where = "keeps none" if kept_start is None else f"keeps those from {kept_start} on"
        raise TokensLost(
            f"the server has session {session_id!r} at position {position}, not {confirmed}, and this client {where}",
            position=position,
            session_id=session_id,
        )
    num_runs = len(runs)
    for index, run in enumerate(runs):
        if run.begin < position < run.end:
            raise TokensLost(
                f"the server has session {session_id!r} at position {position}, inside a run that was to take it from"
                f" {run.begin} to {run.end}",
                position=position,
                session_id=session_id,
            )
        if not run.is_waited_for and position <= run.begin:
            num_runs = index  # given up, and it has not run: neither it nor what was built on it ever does
            break
    while num_runs and runs[num_runs - 1].will_be_repeated:
        num_runs -= 1
    return ResumePlan(replays=position < confirmed, num_runs=num_runs)
