"""One run of one session on its way: what was asked for, so that it can be asked for again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec
from cellserve._results import StepResult
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve.errors import AnswerNotHeld, CellserveError

__all__ = ["Run", "fail_run"]


@dataclass(slots=True, eq=False)
class Run:
    """One run of one session, until its last answer.

    position: where it begins. parts: what has come of an answer in slices. was_sent: whether it was sent on a
    stream that has ended, and so may have run. will_be_repeated: whether its caller has been told to try again.
    """

    request: int
    ledger: Ledger
    spec: OutputSpec
    column: int | TokenColumn | VectorColumn
    count: int
    position: int
    answer_bytes: int
    deadline: float
    answer: asyncio.Future[StepResult]
    parts: list[StepResult] | None = None
    was_sent: bool = False
    will_be_repeated: bool = False


def fail_run(run: Run, error: CellserveError) -> None:
    """A run was refused, withdrawn, or is given up for good."""
    has_run = (
        isinstance(error, AnswerNotHeld) and error.position is not None and error.position >= run.position + run.count
    )
    if run.was_sent and has_run:
        # A repeat: what the run said is lost, and that it ran is not.
        run.ledger.answered(run.position + run.count, run.column, run.answer_bytes)
    else:
        run.ledger.failed(error, run.answer_bytes)
    if not run.answer.done():
        run.answer.set_exception(error)
