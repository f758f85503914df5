"""The names that a client makes: of its requests, its sessions, and of itself as their holder."""

from __future__ import annotations

import secrets
import uuid
from typing import Final

__all__ = ["make_holder", "make_id"]

_HOLDER_BITS: Final = 64


def make_id() -> str:
    """An id for a session or a request that nobody else has."""
    return uuid.uuid4().hex


def make_holder() -> int:
    """The mark under which one session object holds its session: 64 bits, never 0."""
    return secrets.randbits(_HOLDER_BITS) or 1
