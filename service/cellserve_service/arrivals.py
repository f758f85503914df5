"""The runs of one command, or of several that are alike, as columns, while they are decided over.

n rows, N tokens in all, I input size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve_service.digests import U64Array, digest_runs, digest_tokens
from cellserve_service.merging import joined
from cellserve_service.messages import SubmitRuns
from cellserve_service.pools import ragged_indices
from cellserve_service.stepping import FloatArray, IntArray, TokenArray


@dataclass(slots=True)  # not frozen: that takes twice as long to make, and most messages make one
class Arrivals:
    """The rows that are not refused so far."""

    commands: IntArray | None  # (n,) number of the command that each came with; None: one brought all
    streams: IntArray  # (n,)
    rows: IntArray  # (n,) of the session table
    requests: U64Array  # (n,)
    counts: IntArray  # (n,)
    tokens: TokenArray | FloatArray  # (N,) or (N, I)
    positions: IntArray | None  # (n,)
    timeouts_seconds: NDArray[np.float64] | None  # (n,)
    acknowledged: IntArray | None  # (n,)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, commands: Sequence[SubmitRuns], streams: IntArray, rows: IntArray) -> "Arrivals":
        """All rows of commands. rows: (n,) of the session table, of anything where the session is not known."""
        if len(commands) == 1:  # as most often
            one = commands[0]
            tokens: Any = one.vectors if one.tokens is None else one.tokens
            return cls(
                None,
                streams,
                rows,
                one.requests,
                one.counts,
                tokens,
                one.positions,
                one.timeouts_seconds,
                one.acknowledged,
            )
        return cls(
            np.repeat(np.arange(len(commands)), [len(command.requests) for command in commands]),
            streams,
            rows,
            joined([command.requests for command in commands]),
            joined([command.counts for command in commands]),
            joined([command.vectors if command.tokens is None else command.tokens for command in commands]),
            joined([command.positions for command in commands]),
            joined([command.timeouts_seconds for command in commands]),
            joined([command.acknowledged for command in commands]),
        )

    def at(self, places: IntArray) -> "Arrivals":
        """The rows at some places, in this order."""
        tokens: Any = self.tokens
        if len(tokens) == len(self.counts) and (self.counts == 1).all():
            tokens = tokens[places]
        else:
            starts = self.counts.cumsum() - self.counts
            tokens = tokens[ragged_indices(starts[places], self.counts[places])]
        return replace(
            self,
            commands=_at(self.commands, places),
            streams=self.streams[places],
            rows=self.rows[places],
            requests=self.requests[places],
            counts=self.counts[places],
            tokens=tokens,
            positions=_at(self.positions, places),
            timeouts_seconds=_at(self.timeouts_seconds, places),
            acknowledged=_at(self.acknowledged, places),
        )

    def digests(self) -> U64Array:
        """(n,) of each row's tokens."""
        if self.tokens.ndim == 1 and len(self.tokens) == len(self.counts):
            return digest_tokens(self.tokens)  # type: ignore[arg-type]
        return digest_runs(self.tokens, self.counts)


def _at(column: NDArray[Any] | None, places: IntArray) -> NDArray[Any] | None:
    return None if column is None else column[places]
