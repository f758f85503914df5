"""How much one tick of a model takes: as much as keeps its fixed cost small, and nobody waiting."""

from typing import Final

from cellserve_service.runs import Batch

# What comes while a tick runs waits for its end, however fast or slow the model is. Each part of a long run is also
# answered by a message of its own, so parts are small only where single tokens come, or came a moment ago.
ROWS_SECONDS: Final = 0.003
PARTS_SECONDS: Final = 0.01
SINGLES_SECONDS: Final = 0.1
# Of a generate in one tick. Each slice is a message, and a held answer, whatever is in it, so it is small only where
# single tokens come; but its tokens should stream, and a broken call stop soon.
SLICE_TOKENS: Final = 8
SLICE_TOKENS_BESIDE_SINGLES: Final = 2
MAX_SLICE_TOKENS: Final = 16
# Before the first tick has told how long a token takes.
FIRST_TICK_TOKENS: Final = 512


class Pace:
    """efficient_batch: of the stepper, so many rows or fewer are never worth dividing.

    num_left: by Batch, how many sessions were ready for its last tick and not taken.
    """

    def __init__(self, efficient_batch: int) -> None:
        self._efficient_batch = efficient_batch
        self.num_left = [0 for _ in Batch.ALL]
        self._singles_until = 0.0
        self._seconds_a_token = [PARTS_SECONDS / FIRST_TICK_TOKENS for _ in Batch.ALL]

    def note_singles(self, now: float) -> None:
        """Single tokens are stepped now, so that more of them are to be expected."""
        self._singles_until = now + SINGLES_SECONDS

    def num_tokens(self, now: float) -> int:
        """How many tokens the next tick of parts takes."""
        return int(self._seconds(now) / self._seconds_a_token[Batch.PARTS])

    def slice_tokens(self, now: float, num_rows: int) -> int:
        """How many tokens the next tick of generates samples for each of so many."""
        least = SLICE_TOKENS_BESIDE_SINGLES if now < self._singles_until else SLICE_TOKENS
        return min(
            MAX_SLICE_TOKENS, max(least, int(self._seconds(now) / self._seconds_a_token[Batch.GENERATES]) // num_rows)
        )

    def _seconds(self, now: float) -> float:
        return ROWS_SECONDS if now < self._singles_until else PARTS_SECONDS

    def num_rows(self, batch: int, num_ready: int) -> int:
        """How many of the sessions that are ready for a batch the next tick takes.

        Half of many, then the other half: while one is stepped, the clients of the other read their answers, and send
        again. Of generates half of an efficient batch: that is nearly as efficient, and streams.
        """
        if batch == Batch.GENERATES:
            return (self._efficient_batch + 1) // 2
        quick = int(ROWS_SECONDS / self._seconds_a_token[batch])
        return max(self._efficient_batch, min(max(num_ready // 2, self.num_left[batch]), quick))

    def took(self, batch: int, num_tokens: int, seconds: float) -> None:
        """A tick has taken so long."""
        self._seconds_a_token[batch] = max(seconds, 1e-9) / num_tokens
