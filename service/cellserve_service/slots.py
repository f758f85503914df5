"""Gives sessions slots of a model's slab, and parks the longest idle ones in host memory when slots run out."""

import numpy as np

from cellserve_service.sessions import NO_SLOT, SessionTable, Stage
from cellserve_service.stepping import FloatArray, IntArray, Stepper

_NOBODY = -1


class SlotMap:
    """Which session row stands in which slot of one model. Slot 0 is scratch and never given."""

    def __init__(self, sessions: SessionTable, stepper: Stepper, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_parked = 0
        self.num_unparked = 0
        self.num_fetched = 0  # states that came back from the store
        self._sessions = sessions
        self._stepper = stepper
        self._row_by_slot = np.full(num_slots + 1, _NOBODY, np.int32)
        self._free = np.arange(num_slots, 0, -1, dtype=np.int32)
        self._num_free = num_slots

    @property
    def num_resident(self) -> int:
        return self.num_slots - self._num_free

    def make_resident(self, rows: IntArray) -> None:
        """Give every row a slot with its state in it.

        rows are marked as being in a tick, and with those of other ticks they are no more than there are slots.
        """
        sessions = self._sessions
        missing = rows[sessions.slot[rows] == NO_SLOT]
        if not len(missing):
            return
        if len(missing) > self._num_free:
            self._park_idle(len(missing) - self._num_free)
        self._num_free -= len(missing)
        slots = self._free[self._num_free : self._num_free + len(missing)].astype(np.int64)
        sessions.slot[missing] = slots
        self._row_by_slot[slots] = missing
        # A slot is zeroed or overwritten whenever it changes hands, so that no session sees another's state.
        parked = np.array([row in sessions.parked for row in missing.tolist()], np.bool_)
        if not parked.all():
            self._stepper.zero_rows(slots[~parked])
        if parked.any():
            states = [sessions.parked.pop(row) for row in missing[parked].tolist()]
            self._stepper.write_rows(slots[parked], np.stack(states))
            self.num_unparked += len(states)

    def state(self, row: int) -> FloatArray:
        """A copy of a session's state, wherever it is: (L, state_size). Zeros for one that has not run."""
        slot = int(self._sessions.slot[row])
        if slot != NO_SLOT:
            rows = self._read(np.array([slot], np.int64))
            state: FloatArray = rows[0]
            return state
        parked = self._sessions.parked.get(row)
        if parked is not None:
            return parked.copy()
        info = self._stepper.info
        return np.zeros((info.num_layers, info.state_size), np.float32)

    def replace_state(self, row: int, state: FloatArray | None) -> None:
        """Give a session another state, or zeros; it comes to the device with its next run."""
        self.release(row)
        self._sessions.parked.pop(row, None)
        self._sessions.is_in_store[row] = False
        if state is not None:
            self._sessions.parked[row] = state

    def release(self, row: int) -> None:
        """Free the session's slot, if it has one. Its state is gone."""
        slot = int(self._sessions.slot[row])
        if slot == NO_SLOT:
            return
        self._sessions.slot[row] = NO_SLOT
        self._row_by_slot[slot] = _NOBODY
        self._free[self._num_free] = slot
        self._num_free += 1

    def _park_idle(self, wanted: int) -> None:
        """Move the states of the sessions that were used longest ago, and are in no tick, to host memory."""
        sessions = self._sessions
        slots = np.flatnonzero(self._row_by_slot != _NOBODY)
        slots = slots[sessions.stage[self._row_by_slot[slots]] != Stage.IN_TICK]
        assert len(slots) >= wanted
        oldest = np.argpartition(sessions.last_used[self._row_by_slot[slots]], wanted - 1)[:wanted]
        slots = slots[oldest]
        for row, state in zip(self._row_by_slot[slots].tolist(), self._read(slots), strict=True):
            sessions.parked[row] = state.copy()
            self.release(row)
        self.num_parked += wanted

    def _read(self, slots: IntArray) -> FloatArray:
        rows: FloatArray = self._stepper.read_rows(slots)  # (B, L, state_size)
        return rows
