"""Puts runs of many streams together, so that the engine decides over them with one array operation each.

Clients that share nothing send a message a token: what comes of them in one turn of the event loop is one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cellserve_service.messages import Command, SubmitRuns


def merged(commands: Iterable[Command]) -> Iterator[Command | list[SubmitRuns]]:
    """Commands in order; of those that follow each other, runs of the same columns and outputs come as one list."""
    alike: list[SubmitRuns] = []
    for command in commands:
        if isinstance(command, SubmitRuns):
            if alike and not _are_alike(alike[0], command):
                yield alike
                alike = []
            alike.append(command)
            continue
        if alike:
            yield alike
            alike = []
        yield command
    if alike:
        yield alike


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
