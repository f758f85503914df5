"""Which replica serves which session: the same answer in every client, and few sessions that move.

Rendezvous hashing (Thaler and Ravishankar 1998): a session prefers replicas in the order of a hash of its id with
each of them. Where a replica goes, only its own sessions move; where one comes, only those that prefer it.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

__all__ = ["preferred"]


def preferred(session_id: str, targets: Iterable[str]) -> str:
    """The target that a session prefers among these. ValueError where there is none."""
    return max(targets, key=lambda target: (_weight(session_id, target), target))


def _weight(session_id: str, target: str) -> bytes:
    return blake2b(session_id.encode(), key=blake2b(target.encode(), digest_size=32).digest(), digest_size=8).digest()
