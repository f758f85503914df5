"""Compares answers with the oracle's account, as far as float32 can tell."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.oracle import Trace

__all__ = ["assert_outputs", "until"]

# float32 rounds the weights and every step; the cells forget, so that errors do not grow with the sequence.
STATE_TOLERANCE = 2e-5
LOGIT_TOLERANCE = 2e-4


def until(trace: Trace, end: int) -> Trace:
    """The account of the first `end` tokens."""
    return Trace(trace.states[:end], trace.gates[:end], trace.logits[: end + 1])


def assert_outputs(
    found: dict[str, NDArray[Any]], wanted: dict[str, Any], trace: Trace, tokens: list[int] | None, num_rows: int
) -> None:
    """`found` holds what was wanted and nothing else, each the oracle's for the last `num_rows` tokens."""
    names = {"next_token": "next_tokens"}
    expected = {names.get(name, name) for name in wanted if name != "top_k"}
    expected |= {"top_tokens", "top_logprobs"} if "top_k" in wanted else set()
    assert found.keys() == expected
    logits = trace.logits[-num_rows:]
    if "states" in wanted:
        np.testing.assert_allclose(found["states"], trace.states[-num_rows:], rtol=0, atol=STATE_TOLERANCE)
    if "gates" in wanted:
        np.testing.assert_allclose(found["gates"], trace.gates[-num_rows:], rtol=0, atol=STATE_TOLERANCE)
    if "head_outputs" in wanted:
        np.testing.assert_allclose(found["head_outputs"], logits, rtol=0, atol=LOGIT_TOLERANCE)
    if "logprobs" in wanted:
        assert tokens is not None
        logprobs = trace.logprobs(np.array(tokens))[-num_rows:]
        np.testing.assert_allclose(found["logprobs"], logprobs, rtol=0, atol=LOGIT_TOLERANCE)
    if "next_token" in wanted:
        chosen = logits[np.arange(num_rows), found["next_tokens"]]
        np.testing.assert_allclose(chosen, logits.max(axis=1), rtol=0, atol=LOGIT_TOLERANCE)
    if "top_k" in wanted:
        _assert_top(found["top_tokens"], found["top_logprobs"], logits, wanted["top_k"])


def _assert_top(top_tokens: NDArray[Any], top_logprobs: NDArray[Any], logits: NDArray[Any], top_k: int) -> None:
    """Rows of k different tokens, likeliest first; where two are as good as equal, either may come first."""
    assert top_tokens.shape == top_logprobs.shape == (len(logits), top_k)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    best = -np.sort(-logprobs, axis=1)[:, :top_k]
    np.testing.assert_allclose(top_logprobs, best, rtol=0, atol=LOGIT_TOLERANCE)
    of_tokens = np.take_along_axis(logprobs, top_tokens.astype(np.int64), axis=1)
    np.testing.assert_allclose(of_tokens, best, rtol=0, atol=LOGIT_TOLERANCE)
    assert all(len(set(row)) == top_k for row in top_tokens.tolist())
