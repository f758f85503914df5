"""Scores a byte model: bits per byte of each file from a new session's state, beside those of `xz -9e`."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cellserve_model.errors import TrainingError
from cellserve_model.network import Network

__all__ = ["Score", "network_bits_per_byte", "score", "xz_bits_per_byte"]

_FILES_AT_ONCE = 64
_STEPS_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Score:
    """Means over files, each with the same weight, in bits per byte; max_bytes: how much of each was read."""

    num_files: int
    max_bytes: int | None
    bits_per_byte: float
    xz_bits_per_byte: float


def score(network: Network, contents: Sequence[bytes], *, max_bytes: int | None = None) -> Score:
    """Score a byte model on whole files, or on the first `max_bytes` of each."""
    cut = [content[:max_bytes] for content in contents]
    return Score(
        num_files=len(cut),
        max_bytes=max_bytes,
        bits_per_byte=float(network_bits_per_byte(network, cut).mean()),
        xz_bits_per_byte=float(np.mean([xz_bits_per_byte(content) for content in cut])),
    )


def xz_bits_per_byte(content: bytes) -> float:
    """Bits per byte of `xz -9e`, container included, on this content alone."""
    packed = lzma.compress(content, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(content)


def network_bits_per_byte(network: Network, contents: Sequence[bytes]) -> NDArray[np.float64]:
    """Mean of -log2 p(byte | those before) for each file; the first byte is predicted from the zero state.

    Returns (len(contents),) float64. Raises TrainingError where the network does not predict bytes.
    """
    if network.config.vocab_size != 256 or network.config.output_size != 256:
        raise TrainingError("only a model with 256 tokens and 256 outputs predicts bytes")
    if not all(contents):
        raise TrainingError("an empty file has no bits per byte")
    order = sorted(range(len(contents)), key=lambda number: -len(contents[number]))
    totals = np.zeros(len(contents), dtype=np.float64)
    with torch.inference_mode():
        for first in range(0, len(order), _FILES_AT_ONCE):
            group = order[first : first + _FILES_AT_ONCE]
            totals[group] = _nats(network, [contents[number] for number in group]).cpu().numpy()
    lengths = np.array([len(content) for content in contents], dtype=np.float64)
    bits: NDArray[np.float64] = totals / (np.log(2) * lengths)
    return bits


def _nats(network: Network, contents: Sequence[bytes]) -> Tensor:
    """Sum of -ln p of each file, (B,) float64; the files come longest first: the live ones are a prefix."""
    assert network.head is not None
    device = network.head.weight.device
    lengths = np.array([len(content) for content in contents])
    padded = np.zeros((lengths[0], len(contents)), dtype=np.int64)  # (T, B)
    for column, content in enumerate(contents):
        padded[: len(content), column] = np.frombuffer(content, dtype=np.uint8)
    totals = torch.zeros(len(contents), dtype=torch.float64, device=device)
    state = network.zero_state(len(contents))
    hidden = state[:, -1, : network.config.hidden_size]  # (B, H), of the top layer
    for first in range(0, int(lengths[0]), _STEPS_AT_ONCE):
        live = int((lengths > first).sum())
        state, hidden = state[:live], hidden[:live]
        tokens = torch.from_numpy(padded[first : first + _STEPS_AT_ONCE, :live]).to(device)  # (T, B)
        outputs, state = network(tokens, state)
        before = torch.cat((hidden.unsqueeze(0), outputs[:-1]))  # (T, B, H): what each token is predicted from
        hidden = outputs[-1]
        losses = functional.cross_entropy(network.head(before).flatten(0, 1), tokens.flatten(), reduction="none")
        inside = torch.from_numpy(np.arange(first, first + len(tokens))[:, None] < lengths[:live]).to(device)
        totals[:live] += (losses.view(tokens.shape) * inside).double().sum(0)
    return totals
