"""A 64-bit digest of a run's tokens, so that a repeat can be told from another run at the same position.

Runs are compared with runs of as many tokens. That of a single word is the word itself: most runs are one token.
"""

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import FloatArray, IntArray, TokenArray

U64Array = NDArray[np.uint64]
U64 = np.uint64
_GOLDEN = U64(0x9E3779B97F4A7C15)


def _mix(values: U64Array) -> U64Array:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> U64(27))) * U64(0x94D049BB133111EB)
    return values ^ (values >> U64(31))


def digest_runs(tokens: TokenArray | FloatArray, counts: IntArray) -> U64Array:
    """One digest for each run. tokens: (N,) ids or (N, I) vectors, run after run; counts: (n,) at least 1."""
    words = np.ascontiguousarray(tokens).view(np.uint32).reshape(len(tokens), -1)  # (N, I)
    starts = counts.cumsum() - counts
    before: IntArray = words.shape[1] * (np.arange(len(tokens)) - np.repeat(starts, counts))  # words of the run
    # The order enters by the place: every word is mixed with a number that only its place in the run has.
    places: U64Array = np.add(before.astype(U64)[:, None], np.arange(1, words.shape[1] + 1, dtype=U64), dtype=U64)
    digests: U64Array = np.add.reduceat(_mix(words + _mix(places * _GOLDEN)).sum(axis=1, dtype=U64), starts)
    if words.shape[1] == 1:
        single = counts == 1
        digests[single] = words[starts[single], 0]
    return digests


def digest_tokens(tokens: TokenArray) -> U64Array:
    """What digest_runs gives for runs of one token each."""
    return tokens.astype(U64)


def digest_settings(*settings: float | tuple[int, ...]) -> int:
    """A digest of sampling settings: equal for equal settings, in this process."""
    flat = repr(settings).encode()
    padded = np.frombuffer(flat + b"\0" * (-len(flat) % 4), np.uint32)
    return int(digest_runs(padded, np.array([len(padded)], np.int64))[0])
