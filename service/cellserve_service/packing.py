"""Puts alike messages of many streams together before they cross to another process, and takes them apart there.

Clients that share nothing send a message a token. Arrays of one number each cost as much on the way as arrays of a
thousand; so what follows one another with the same columns goes as one, with its length at each stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import numpy as np

from cellserve_service.messages import Answers, SubmitRuns
from cellserve_service.outputs import OutputArrays
from cellserve_service.stepping import IntArray

__all__ = ["PackedAnswers", "PackedRuns", "pack", "unpack"]

_OUTPUTS = tuple(field.name for field in fields(OutputArrays))


@dataclass(frozen=True, slots=True)
class PackedRuns:
    """Runs of m streams. rows, tokens: (m,) how many of each are whose. together: of all, and of no stream."""

    streams: list[int]
    rows: IntArray
    tokens: IntArray
    together: SubmitRuns


@dataclass(frozen=True, slots=True)
class PackedAnswers:
    """Answers to m streams. rows, output_rows: (m,) how many of each are whose. together: of all, to no stream."""

    streams: list[int]
    rows: IntArray
    output_rows: IntArray
    together: Answers


def pack(batch: Sequence[object]) -> Sequence[object]:
    """The batch with alike neighbours put together."""
    if len(batch) < 2:
        return batch
    packed: list[object] = []
    for columns, group in groupby(batch, _columns):
        alike: list[Any] = list(group)
        if columns is None or len(alike) < 2:
            packed += alike
        else:
            packed.append(_pack_runs(alike) if isinstance(alike[0], SubmitRuns) else _pack_answers(alike))
    return packed


def unpack(packed: Sequence[object]) -> list[object]:
    """The batch as it was."""
    batch: list[object] = []
    for message in packed:
        if isinstance(message, PackedRuns):
            batch += _unpack_runs(message)
        elif isinstance(message, PackedAnswers):
            batch += _unpack_answers(message)
        else:
            batch.append(message)
    return batch


def _columns(message: object) -> object:
    """What must be equal for messages to go together; None for those that go alone."""
    if isinstance(message, SubmitRuns) and message.session_ids is None:
        return (
            message.outputs,
            message.max_output_bytes,
            None if message.vectors is None else message.vectors.shape[1],
            message.positions is None,
            message.timeouts_seconds is None,
            message.acknowledged is None,
        )
    if isinstance(message, Answers):
        outputs = message.outputs
        shapes = tuple([None if (array := getattr(outputs, name)) is None else array.shape[1:] for name in _OUTPUTS])
        return message.model, shapes
    return None


def _pack_runs(alike: Sequence[SubmitRuns]) -> PackedRuns:
    def all_of(column: Callable[[SubmitRuns], Any]) -> Any:
        return None if column(alike[0]) is None else np.concatenate([column(runs) for runs in alike])

    together = replace(
        alike[0],
        stream=0,
        requests=all_of(lambda runs: runs.requests),
        handles=all_of(lambda runs: runs.handles),
        counts=all_of(lambda runs: runs.counts),
        tokens=all_of(lambda runs: runs.tokens),
        vectors=all_of(lambda runs: runs.vectors),
        positions=all_of(lambda runs: runs.positions),
        timeouts_seconds=all_of(lambda runs: runs.timeouts_seconds),
        acknowledged=all_of(lambda runs: runs.acknowledged),
    )
    rows = np.array([len(runs.requests) for runs in alike])
    inputs = [runs.tokens if runs.vectors is None else runs.vectors for runs in alike]
    tokens = np.array([0 if given is None else len(given) for given in inputs])
    return PackedRuns([runs.stream for runs in alike], rows, tokens, together)


def _unpack_runs(packed: PackedRuns) -> Iterator[SubmitRuns]:
    of_all = packed.together
    for stream, rows, tokens in zip(packed.streams, _slices(packed.rows), _slices(packed.tokens), strict=True):
        yield SubmitRuns(
            stream=stream,
            requests=of_all.requests[rows],
            handles=None if of_all.handles is None else of_all.handles[rows],
            session_ids=None,
            counts=of_all.counts[rows],
            tokens=None if of_all.tokens is None else of_all.tokens[tokens],
            vectors=None if of_all.vectors is None else of_all.vectors[tokens],
            positions=None if of_all.positions is None else of_all.positions[rows],
            timeouts_seconds=None if of_all.timeouts_seconds is None else of_all.timeouts_seconds[rows],
            acknowledged=None if of_all.acknowledged is None else of_all.acknowledged[rows],
            outputs=of_all.outputs,
            max_output_bytes=of_all.max_output_bytes,
        )


def _pack_answers(alike: Sequence[Answers]) -> PackedAnswers:
    def all_of(column: Callable[[Answers], Any]) -> Any:
        return np.concatenate([column(answers) for answers in alike])

    outputs = OutputArrays.concatenate([answers.outputs for answers in alike])
    together = replace(
        alike[0],
        stream=0,
        requests=all_of(lambda answers: answers.requests),
        positions=all_of(lambda answers: answers.positions),
        counts=all_of(lambda answers: answers.counts),
        remaining=all_of(lambda answers: answers.remaining),
        outputs=outputs,
        num_output_rows=all_of(lambda answers: answers.num_output_rows),
        accepted_at=all_of(lambda answers: answers.accepted_at),
    )
    rows = np.array([len(answers.requests) for answers in alike])
    firsts = rows.cumsum() - rows
    output_rows = np.add.reduceat(together.num_output_rows, firsts)
    return PackedAnswers([answers.stream for answers in alike], rows, output_rows, together)


def _unpack_answers(packed: PackedAnswers) -> Iterator[Answers]:
    of_all = packed.together
    given = [(name, array) for name in _OUTPUTS if (array := getattr(of_all.outputs, name)) is not None]
    for stream, rows, outputs in zip(packed.streams, _slices(packed.rows), _slices(packed.output_rows), strict=True):
        yield Answers(
            stream=stream,
            requests=of_all.requests[rows],
            positions=of_all.positions[rows],
            counts=of_all.counts[rows],
            remaining=of_all.remaining[rows],
            outputs=OutputArrays(**{name: array[outputs] for name, array in given}),
            num_output_rows=of_all.num_output_rows[rows],
            accepted_at=of_all.accepted_at[rows],
            model=of_all.model,
        )


def _slices(lengths: IntArray) -> list[slice]:
    """Where parts of these lengths lie, one behind the other."""
    ends = lengths.cumsum().tolist()
    return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
