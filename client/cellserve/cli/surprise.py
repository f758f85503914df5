"""Finds what surprised a byte model in a text: bits per byte, and the lines it had expected least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["SurprisingLine", "bits_of", "most_surprising_lines"]

_NEWLINE: Final = ord("\n")
_MAX_EXCERPT: Final = 60


@dataclass(frozen=True, slots=True)
class SurprisingLine:
    """A line of a text. number: from 1. bits: the surprisal of all its bytes. excerpt: fit to be printed."""

    number: int
    num_bytes: int
    bits: float
    excerpt: str


def bits_of(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Surprisals in bits. logprobs: natural logarithms."""
    return -logprobs.astype(np.float64) / math.log(2)


def most_surprising_lines(text: bytes, bits: npt.NDArray[np.float64], *, max_lines: int) -> list[SurprisingLine]:
    """The lines whose bytes together were least likely, most surprising first. bits: one for each byte."""
    values = np.frombuffer(text, dtype=np.uint8)
    assert len(values) == len(bits)
    if not len(values):
        return []
    ends_line = values == _NEWLINE
    line_of_byte = np.cumsum(ends_line) - ends_line  # a line's end belongs to the line
    line_bits = np.bincount(line_of_byte, weights=bits)
    order = np.argsort(-line_bits, kind="stable")[:max_lines]
    starts = np.searchsorted(line_of_byte, order)
    ends = np.searchsorted(line_of_byte, order, side="right")
    return [
        SurprisingLine(
            number=int(line) + 1,
            num_bytes=int(end - start),
            bits=float(line_bits[line]),
            excerpt=_excerpt(text[start:end], bits[start:end]),
        )
        for line, start, end in zip(order, starts, ends, strict=True)
    ]


def _excerpt(line: bytes, bits: npt.NDArray[np.float64]) -> str:
    """The line without indentation; of a long one, the part around its most surprising bytes."""
    indentation = len(line) - len(line.lstrip())
    line, bits = line[indentation:].rstrip(), bits[indentation:]
    begin = 0
    if len(line) > _MAX_EXCERPT:
        sums = np.convolve(bits[: len(line)], np.ones(_MAX_EXCERPT), mode="valid")
        begin = int(np.argmax(sums))
    part = line[begin : begin + _MAX_EXCERPT].decode(errors="replace")
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in part)
    return f"{'…' if begin else ''}{shown}{'…' if begin + _MAX_EXCERPT < len(line) else ''}"
