"""Copies sessions out of the engine's arrays as they stand, and puts stored ones back.

n sessions of one model, A held answers of theirs, L layers, S the state size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.pools import ragged_indices
from cellserve_service.runs import NOT_HELD, Kind
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_SLOT
from cellserve_service.stepping import FloatArray, IntArray
from cellserve_service.stores.operations import Row
from cellserve_service.stores.rows import (
    ANSWER_DTYPE,
    LastRequest,
    StoredSession,
    encode_marks,
    encode_session,
    spec_columns,
    spec_of,
)

_NO_REQUEST = LastRequest("", 0, 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sessions at one moment, apart from the arrays they came from: another thread may encode them."""

    rows: IntArray  # (n,) of the session table
    incarnations: NDArray[np.uint32]  # (n,)
    lines: IntArray  # (n,)
    positions: IntArray  # (n,)
    model: str
    session_ids: Sequence[str]
    sessions: Sequence[StoredSession]
    holders: Sequence[int]
    expires_at: Sequence[float]  # wall clock
    marks: Sequence[dict[str, tuple[int, FloatArray]] | None]  # None: as they are stored

    def encode(self) -> list[Row]:
        """The rows to be stored."""
        return [
            Row(
                session_id=session_id,
                model=self.model,
                epoch=session.epoch,
                position=session.position,
                holder=holder,
                expires_at=expires_at,
                request_id=session.last_request.request_id,
                blob=encode_session(session_id, session),
                checkpoints=None if marks is None else encode_marks(session_id, marks) if marks else b"",
            )
            for session_id, session, holder, expires_at, marks in zip(
                self.session_ids, self.sessions, self.holders, self.expires_at, self.marks, strict=True
            )
        ]


def take_snapshot(core: Core, served: ServedModel, rows: IntArray, *, with_marks: bool = False) -> Snapshot:
    """Copy sessions of one model that stand at a run boundary, and whose states are on the device or the host."""
    sessions, info = core.sessions, served.info
    states = _states(core, served, rows)
    answers, words, first_answer, first_word = _held_answers(served, rows)
    stored = []
    columns = (
        rows,
        sessions.position[rows],
        sessions.line[rows],
        sessions.durability[rows],
        sessions.created_at[rows],
    )
    for place, (row, position, epoch, durability, created_at) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        stored.append(
            StoredSession(
                fingerprint=info.fingerprint,
                num_layers=info.num_layers,
                state_size=info.state_size,
                position=position,
                epoch=epoch,
                durability=durability,
                created_at=created_at + core.wall_offset,
                last_request=sessions.last_request.get(row, _NO_REQUEST),
                values=states[place],
                answers=answers[first_answer[place] : first_answer[place + 1]],
                words=words[first_word[place] : first_word[place + 1]],
            )
        )
    expires_at = sessions.last_used[rows] + core.limits.idle_timeout_seconds + core.wall_offset
    return Snapshot(
        rows=rows,
        incarnations=sessions.incarnation[rows],
        lines=sessions.line[rows],
        positions=sessions.position[rows],
        model=info.name,
        session_ids=[sessions.ids[row] or "" for row in rows.tolist()],
        sessions=stored,
        holders=sessions.holder[rows].tolist(),
        expires_at=expires_at.tolist(),
        marks=[dict(sessions.marks.get(row, {})) if with_marks else None for row in rows.tolist()],
    )


def _states(core: Core, served: ServedModel, rows: IntArray) -> list[FloatArray | None]:
    """The states of sessions, in one copy from the device; None for one that has not run."""
    slots = core.sessions.slot[rows]
    states: list[FloatArray | None] = [core.sessions.parked.get(row) for row in rows.tolist()]
    resident = np.flatnonzero(slots != NO_SLOT)
    if len(resident):
        read = served.stepper.read_rows(slots[resident].astype(np.int64))
        for place, state in zip(resident.tolist(), read, strict=True):
            states[place] = state
    return states


def _held_answers(served: ServedModel, rows: IntArray) -> tuple[NDArray[Any], NDArray[np.uint32], list[int], list[int]]:
    """The held answers of sessions, one session behind the other, and where those of each begin."""
    table = served.runs
    runs, places = table.held_runs(rows)
    held_words = table.held_words[runs].astype(np.int64)
    kinds = table.kind[runs]
    answers = np.zeros(len(runs), ANSWER_DTYPE)
    is_run = kinds == Kind.RUN
    answers[is_run] = spec_columns(served.specs.specs)[table.spec[runs[is_run]]]
    answers["start"] = table.start[runs]
    answers["digest"] = table.digest[runs]
    answers["count"] = table.count[runs]
    answers["words"] = held_words
    answers["kind"] = kinds
    answers["is_held"] = table.held[runs] != NOT_HELD
    words = table.held_pool.rows[ragged_indices(np.maximum(table.held[runs], 0), held_words), 0]
    starts = np.arange(len(rows) + 1)
    first_answer = np.searchsorted(places, starts)
    ends = np.concatenate(([0], held_words.cumsum()))
    return answers, words, first_answer.tolist(), ends[first_answer].tolist()


def restore_answers(core: Core, served: ServedModel, row: int, stored: StoredSession) -> None:
    """Hold the answers of a stored session again. One that could not be given now is let go of."""
    table = served.runs
    offset = 0
    for answer in stored.answers:
        num_words = int(answer["words"])
        words = stored.words[offset : offset + num_words]
        offset += num_words
        spec = 0
        if answer["kind"] == Kind.RUN:
            number = served.specs.number(spec_of(answer), core.limits.max_answer_bytes)
            if isinstance(number, Refusal):
                continue
            spec = number
        runs = table.allocate(1, int(answer["kind"]))
        run = int(runs[0])
        table.session[run] = row
        table.start[run] = answer["start"]
        table.count[run] = answer["count"]
        table.digest[run] = answer["digest"]
        table.spec[run] = spec
        if answer["is_held"] and num_words:
            table.hold(runs, np.array([num_words]))
            table.held_answer(run)[:] = words
        table.insert_held(np.array([row], np.int64), runs)
    limits = core.limits
    table.release_beyond(np.array([row], np.int64), limits.max_held_answers, limits.max_held_answer_bytes // 4)
