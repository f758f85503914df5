"""One model as the engine serves it: its stepper, runs, slots, and the queues of sessions that have work."""

import numpy as np

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import predicts_tokens
from cellserve_service.pace import Pace
from cellserve_service.queues import RowQueue
from cellserve_service.runs import Batch, RunTable
from cellserve_service.sessions import SessionTable
from cellserve_service.slots import SlotMap
from cellserve_service.specs import SpecTable
from cellserve_service.stepping import Stepper


class ServedModel:
    """Everything of the engine that belongs to one model."""

    def __init__(self, index: int, stepper: Stepper, sessions: SessionTable, limits: EngineLimits) -> None:
        self.index = index
        self.stepper = stepper
        self.info = stepper.info
        self.runs = (
            RunTable(sessions, np.uint32, 1)
            if self.info.input_size is None
            else RunTable(sessions, np.float32, self.info.input_size)
        )
        self.specs = SpecTable(self.info)
        self.slots = SlotMap(sessions, stepper, min(stepper.num_slots, limits.max_sessions))
        # Sessions whose first unfinished run a tick can take, by Batch.
        self.ready = tuple(RowQueue(limits.max_sessions) for _ in Batch.ALL)
        self.num_in_ticks = 0  # sessions
        self.pace = Pace(stepper.efficient_batch)

    def num_room(self, batch: int) -> int:
        """How many sessions one more tick takes at most."""
        most = self.pace.num_rows(batch, len(self.ready[batch]))
        return min(most, self.stepper.max_batch, self.slots.num_slots - self.num_in_ticks)

    @property
    def takes_tokens(self) -> bool:
        return self.info.vocab_size is not None

    @property
    def can_generate(self) -> bool:
        return predicts_tokens(self.info)
