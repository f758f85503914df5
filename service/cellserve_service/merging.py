"""Puts runs of many streams together, so that the engine decides over them with one array operation each.

Clients that share nothing send a message a token: what comes of them in one turn of the event loop is one batch.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellserve_service.messages import Command, SubmitRuns


def take_alike(commands: deque[Command]) -> list[SubmitRuns]:
    """Take runs of the same columns and outputs off the front of a deque, which begins with one."""
    first = commands.popleft()
    assert isinstance(first, SubmitRuns)
    alike = [first]
    while commands and isinstance(following := commands[0], SubmitRuns) and _are_alike(first, following):
        alike.append(following)
        commands.popleft()
    return alike


def _are_alike(first: SubmitRuns, other: SubmitRuns) -> bool:
    return (
        (first.handles is None) == (other.handles is None)
        and (first.positions is None) == (other.positions is None)
        and (first.timeouts_seconds is None) == (other.timeouts_seconds is None)
        and (first.acknowledged is None) == (other.acknowledged is None)
        and first.max_output_bytes == other.max_output_bytes
        and _width(first) == _width(other)
        and (first.outputs is other.outputs or first.outputs == other.outputs)
    )


def _width(command: SubmitRuns) -> int | None:
    """Numbers in a vector; None: it brings tokens."""
    return None if command.vectors is None else command.vectors.shape[1]


def joined(columns: Sequence[Any]) -> Any:
    """One column of all; None where the first is None, which then all are."""
    if len(columns) == 1 or columns[0] is None:
        return columns[0]
    return np.concatenate(columns)
