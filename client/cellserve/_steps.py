"""Steps that cannot simply be sent: those that have to wait, and those that take several runs."""

from __future__ import annotations

import asyncio

from cellserve._attachment import Attachment
from cellserve._deadline import Timeout
from cellserve._outputs import OutputSpec
from cellserve._results import StepResult, join_results
from cellserve._runs import Run
from cellserve._tokens import TokenColumn, VectorColumn

__all__ = ["step_in_turn"]


async def step_in_turn(
    attachment: Attachment,
    spec: OutputSpec,
    column: int | TokenColumn | VectorColumn,
    count: int,
    timeout: Timeout,
    deadline: float,
) -> StepResult:
    """A step of count tokens, which waits its turn, attaches the session where it must, and sends run after run."""
    ledger, size = attachment.ledger, attachment.model.max_run_tokens(spec)
    runs: list[Run] = []
    try:
        async with attachment.turn("the step", deadline):
            for begin in range(0, max(count, 1), size):
                part, part_count = column, count
                if not isinstance(column, int) and count > size:
                    part = column[begin : begin + size]
                    part_count = len(part)
                is_last = begin + part_count == count
                part_spec = spec if is_last or spec.at == "every" else attachment.model.no_outputs
                conversation = await attachment.until_ready(part_spec, part_count, deadline)
                if any(run.answer.done() and run.answer.exception() for run in runs):
                    break  # the runs behind it are refused as a gap
                handle = ledger.handle
                assert handle is not None
                runs.append(conversation.send_run(ledger, handle, part_spec, part, part_count, timeout, deadline))
        answers = await asyncio.gather(*(run.answer for run in runs), return_exceptions=True)
    except BaseException:
        for run in runs:
            if run.answer.cancel() or run.answer.cancelled():
                attachment.give_up(run)
            else:
                run.answer.exception()  # seen, so that asyncio does not complain of it
        raise
    results = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        results.append(answer)
    return join_results(results)
