"""Chooses the text to follow: the first bytes of standard library files that the model never saw in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cellserve_model import SourceFile, held_out_files

__all__ = ["Excerpt", "choose_excerpts"]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The first bytes of a file. module: its dotted name."""

    module: str
    content: bytes


def choose_excerpts(num_files: int, max_bytes: int) -> list[Excerpt]:
    """Held-out files that are long enough, in the corpus' order; where those are too few, the longest of the others."""
    return cut(held_out_files(), num_files, max_bytes)


def cut(files: Sequence[SourceFile], num_files: int, max_bytes: int) -> list[Excerpt]:
    """The same, out of given files."""
    contents = [Excerpt(file.module, file.read_bytes()[:max_bytes]) for file in files]
    whole = [excerpt for excerpt in contents if len(excerpt.content) == max_bytes]
    short = sorted(
        (excerpt for excerpt in contents if len(excerpt.content) < max_bytes),
        key=lambda excerpt: -len(excerpt.content),
    )
    return [*whole, *short][:num_files]
