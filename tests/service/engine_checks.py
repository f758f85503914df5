"""What must hold inside the engine after every step, whatever was asked of it."""

from __future__ import annotations

import itertools

import numpy as np

from cellserve_service.core import Core
from cellserve_service.runs import NOT_ASKED, Kind, Status
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_RUN, NO_SLOT, Durability, Stage

__all__ = ["check_engine", "check_kept", "check_nothing_left"]


def check_engine(core: Core) -> None:
    """Counters, chains, queues, slots and free lists agree with one another."""
    sessions = core.sessions
    open_rows = np.flatnonzero(sessions.is_open).tolist()
    assert len(open_rows) == len(sessions)
    assert sorted(sessions._free[: sessions.num_free].tolist() + open_rows) == list(range(sessions.capacity))
    assert {row: name for name, row in sessions.row_by_id.items()} == {
        row: name for row, name in enumerate(sessions.ids) if name is not None
    }
    queue = sessions._idle_queue
    queued = sorted([*queue._due.tolist(), *itertools.chain.from_iterable(queue._buckets.values())])
    assert queued == np.flatnonzero(queue._is_here).tolist()
    assert set(open_rows) <= set(queued)
    for column in sessions._zero_when_free:
        assert not column[~sessions.is_open].any()
    assert set(sessions.parked) <= set(open_rows)
    assert sorted(core.generations) == np.flatnonzero(sessions.is_generating).tolist()
    assert core.num_pending_tokens == sessions.num_pending_tokens.sum()
    seen: set[tuple[int, int]] = set()
    for row in range(sessions.capacity):
        if row in open_rows:
            seen |= _check_session(core, row)
        else:
            assert sessions.first_run[row] == sessions.last_run[row] == sessions.last_held[row] == NO_RUN
            assert not sessions.num_pending_tokens[row]
            assert sessions.stage[row] == Stage.IDLE
            assert sessions.slot[row] == NO_SLOT
    for served in core.served:
        _check_model(core, served, {run for model, run in seen if model == served.index})
    operations = {key for key in seen if core.served[key[0]].runs.kind[key[1]] == Kind.OPERATION}
    assert set(core.operations) == operations
    for model, run in core.joined:
        assert core.served[model].runs.kind[run] == Kind.RUN
        assert core.served[model].runs.status[run] in (Status.WAITING, Status.STARTED)


def check_kept(core: Core) -> None:
    """What is known of the store agrees with the sessions."""
    sessions, keeping = core.sessions, core.keeping
    assert keeping is not None
    in_store = np.flatnonzero(sessions.is_in_store)
    assert sessions.is_open[in_store].all()
    assert (sessions.slot[in_store] == NO_SLOT).all()
    assert not set(in_store.tolist()) & set(sessions.parked)
    assert not (sessions.is_due & ~sessions.is_dirty).any()
    assert (sessions.durability[sessions.is_dirty] != Durability.NONE).all()
    assert (sessions.stage[sessions.is_in_store & (sessions.next_run != NO_RUN)] == Stage.LOADING).all()
    assert all(sessions.is_open[row] for row in keeping.withholding.rows)
    if keeping.num_writing == 0:
        assert not keeping._changed_at
        # What waits to be durable, waits for a write.
        assert keeping.withholding.rows <= set(np.flatnonzero(sessions.is_dirty | sessions.is_leaving).tolist())


def check_nothing_left(core: Core) -> None:
    """With every session closed, nothing is held, counted, queued or kept."""
    check_engine(core)
    sessions = core.sessions
    assert len(sessions) == 0
    assert core.num_pending_tokens == 0
    assert not sessions.parked
    assert not core.operations
    assert not core.joined
    assert not core.generations
    assert not core.closing
    if core.keeping is not None:
        assert not core.keeping.withholding.rows
        assert not core.keeping._claims
        assert not core.keeping.requests
        assert core.keeping.num_writing == 0
    for served in core.served:
        assert len(served.runs) == len(served.runs.requests) == 0
        assert served.runs.requests.token_pool.num_live == served.runs.held_pool.num_live == 0
        assert served.slots.num_resident == 0
        assert served.num_in_ticks == 0
        assert not any(len(queue) for queue in served.ready)


def _check_session(core: Core, row: int) -> set[tuple[int, int]]:
    sessions, served = core.sessions, core.model_of(row)
    runs = served.runs
    chain = list(runs.chain(row))
    held = [run for run in chain if runs.status[run] == Status.HELD]
    unfinished = chain[len(held) :]
    assert all(runs.status[run] in (Status.WAITING, Status.STARTED) for run in unfinished)
    assert all(runs.session[run] == row for run in chain)
    assert sessions.num_held[row] == len(held)
    assert sessions.last_held[row] == (held[-1] if held else NO_RUN)
    assert sessions.held_words[row] == sum(int(runs.held_words[run]) for run in held)
    assert sessions.num_held[row] <= core.limits.max_held_answers
    assert 4 * sessions.held_words[row] <= core.limits.max_held_answer_bytes
    assert sessions.next_run[row] == (unfinished[0] if unfinished else NO_RUN)
    assert sessions.last_run[row] == (chain[-1] if chain else NO_RUN)
    assert sessions.num_unfinished[row] == len(unfinished)
    plain = [run for run in unfinished if runs.kind[run] == Kind.RUN]
    assert sessions.num_pending_tokens[row] == sum(
        int(runs.count[run] - runs.requests.done[runs.asked[run]]) for run in plain
    )
    assert sessions.num_pending_tokens[row] <= core.limits.max_session_pending_tokens
    assert all(runs.status[run] == Status.WAITING for run in unfinished[1:])
    if not any(runs.kind[run] == Kind.OPERATION for run in unfinished):
        assert sessions.accepted[row] == sessions.position[row] + sessions.num_pending_tokens[row]
    generates = [run for run in unfinished if runs.kind[run] == Kind.GENERATE]
    assert generates == ([core.generations[row].run] if row in core.generations else [])
    if sessions.stage[row] != Stage.LOADING:
        assert (sessions.stage[row] != Stage.IDLE) == bool(unfinished)
        assert not unfinished or runs.kind[unfinished[0]] != Kind.OPERATION
    if sessions.stage[row] == Stage.RESTING:
        waits_for_store = core.keeping is not None and bool(core.keeping.trouble) and bool(generates)
        assert waits_for_store or runs.request_of(unfinished[0])[0] in core.paused_streams
    assert not (row in sessions.parked and sessions.slot[row] != NO_SLOT)
    return {(served.index, run) for run in chain}


def _check_model(core: Core, served: ServedModel, chained: set[int]) -> None:
    sessions, runs = core.sessions, served.runs
    free = runs._free[: runs._num_free].tolist()
    assert sorted(free + sorted(chained)) == list(range(len(runs.status)))
    assert (runs.status[free] == Status.FREE).all()
    assert (runs.held_words[free] == 0).all()
    waiting = (runs.status == Status.WAITING) | (runs.status == Status.STARTED)
    requests = runs.requests
    asked = runs.asked[waiting & (runs.kind != Kind.OPERATION)].tolist()
    assert (requests.run[asked] == np.flatnonzero(waiting & (runs.kind != Kind.OPERATION))).all()
    assert sorted(requests._free[: requests._num_free].tolist() + asked) == list(range(len(requests.run)))
    assert (runs.asked[~waiting & (runs.status != Status.FREE)] == NOT_ASKED).all()
    assert requests.token_pool.num_live == requests.num_tokens.sum() == runs.count[waiting].sum()
    assert runs.held_pool.num_live == runs.held_words.sum()
    of_model = sessions.model == served.index
    stage = np.where(of_model & sessions.is_open, sessions.stage, 0)
    assert served.num_in_ticks == np.count_nonzero(stage == Stage.IN_TICK)
    queued: list[int] = []
    for batch, queue in enumerate(served.ready):
        places = queue._places(queue._head, queue._length)
        rows = [row for row in queue._ring[places].tolist() if row >= 0]
        assert len(rows) == len(queue)
        assert all(runs.batch_of(int(sessions.next_run[row])) == batch for row in rows)
        queued += rows
    assert sorted(queued) == np.flatnonzero(stage == Stage.READY).tolist()
    slots = served.slots
    resident = np.flatnonzero(of_model & (sessions.slot != NO_SLOT)).tolist()
    assert {row: int(sessions.slot[row]) for row in resident} == {
        int(row): slot for slot, row in enumerate(slots._row_by_slot.tolist()) if row >= 0
    }
    free_slots = slots._free[: slots._num_free].tolist()
    assert sorted(free_slots + sessions.slot[resident].tolist()) == list(range(1, slots.num_slots + 1))
