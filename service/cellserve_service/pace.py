"""How much one tick of a model takes: as much as keeps its fixed cost small, and nobody waiting."""

from typing import Final

# What comes while a tick runs waits for its end, however fast or slow the model is. Each part of a long run is also
# answered by a message of its own, so parts are small only where single tokens come, or came a moment ago.
ROWS_SECONDS: Final = 0.003
PARTS_SECONDS: Final = 0.01
SINGLES_SECONDS: Final = 0.1
# Before the first tick has told how long a token takes.
FIRST_TICK_TOKENS: Final = 512


class Pace:
    """efficient_batch: of the stepper, so many rows or fewer are never worth dividing.

    num_left: how many sessions were ready for the last tick and not taken.
    """

    def __init__(self, efficient_batch: int) -> None:
        self._efficient_batch = efficient_batch
        self.num_left = 0
        self._singles_until = 0.0
        self._seconds_a_token = PARTS_SECONDS / FIRST_TICK_TOKENS

    def num_tokens(self, now: float, *, has_singles: bool) -> int:
        """How many tokens the next tick takes, where some of its runs are long. has_singles: others have one token."""
        if has_singles:
            self._singles_until = now + SINGLES_SECONDS
        return int((ROWS_SECONDS if now < self._singles_until else PARTS_SECONDS) / self._seconds_a_token)

    def num_rows(self, num_ready: int) -> int:
        """How many of the sessions that are ready the next tick takes.

        Half of many, then the other half: while one is stepped, the clients of the other read their answers, and send
        again.
        """
        return max(
            self._efficient_batch, min(max(num_ready // 2, self.num_left), int(ROWS_SECONDS / self._seconds_a_token))
        )

    def took(self, num_tokens: int, seconds: float) -> None:
        """A tick has taken so long."""
        self._seconds_a_token = max(seconds, 1e-9) / num_tokens
