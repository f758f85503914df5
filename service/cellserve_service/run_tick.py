"""A tick of runs as it passes from its beginning to its end.

B rows of the tick (sessions), N tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve_service.served import ServedModel
from cellserve_service.stepping import IntArray


@dataclass(slots=True)  # not frozen: that takes twice as long to make
class RunTick:
    """A batch of runs on its way through the stepper."""

    served: ServedModel
    batch: int  # SINGLES or PARTS
    rows: IntArray  # (B,) session rows
    runs: IntArray  # (B,)
    asked: IntArray  # (B,) their requests
    spec: IntArray  # (B,) index into the model's output specs
    is_alike: bool  # all ask for the same outputs
    ends: bool  # all runs end with this tick
    counts: IntArray  # (B,) tokens that each advances
    done: IntArray  # (B,) tokens that each has done afterwards
    remaining: IntArray  # (B,) tokens that are left to each afterwards
    wants: NDArray[np.uint8]  # (N,) bits of Want
    ticket: Any
    begun_at: float
