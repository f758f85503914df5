"""The bounds that the engine keeps: DESIGN.md's settings, as the engine sees them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Every queue, table, message and answer has a limit."""

    max_sessions: int = 65536
    max_run_tokens: int = 4096
    max_session_pending_tokens: int = 8192
    max_pending_tokens: int = 1048576
    max_held_answers: int = 64
    max_held_answer_bytes: int = 65536
    max_answer_bytes: int = 1048576
    evict_when_full: bool = False
    max_open_sessions: int = 10000
    max_parked_states: int = 65536
    max_checkpoints: int = 8
    idle_timeout_seconds: float = 3600.0
    ended_session_memory_seconds: float = 600.0
    # A tick gives each session so many steps of its run at most, and so many in all before it takes one each, however
    # quick they are; mostly time bounds them first (pace.py).
    max_slice_tokens: int = 256
    max_sliced_tick_tokens: int = 16384
