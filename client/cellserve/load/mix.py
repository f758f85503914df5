"""What requests a load is made of, and in which proportion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

__all__ = ["Mix", "MixError", "Work", "parse_mix"]

_DEFAULT_TOKENS: Final = {"step": 1, "run": 16, "generate": 16}
_PART: Final = re.compile(r"(step|run|generate)(\d{1,7})?(?::(\d{1,6}))?")


class MixError(ValueError):
    """A mix is written in a way that means nothing."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of request: a step of so many tokens, or so many tokens generated."""

    kind: Literal["step", "generate"]
    num_tokens: int

    @property
    def name(self) -> str:
        if self.kind == "generate":
            return f"generate{self.num_tokens}"
        return "step" if self.num_tokens == 1 else f"run{self.num_tokens}"


@dataclass(frozen=True, slots=True)
class Mix:
    """Kinds of requests with their weights, which are above 0."""

    works: tuple[Work, ...]
    weights: tuple[int, ...]

    @property
    def tokens_per_request(self) -> float:
        """On average."""
        tokens = sum(work.num_tokens * weight for work, weight in zip(self.works, self.weights, strict=True))
        return tokens / sum(self.weights)

    def draw(self, number: int, random: np.random.Generator) -> list[Work]:
        """So many requests, each drawn by weight."""
        if len(self.works) == 1:
            return [self.works[0]] * number
        weights = np.array(self.weights, np.float64)
        chosen = random.choice(len(self.works), number, p=weights / weights.sum())
        return [self.works[index] for index in chosen.tolist()]


def parse_mix(text: str) -> Mix:
    """Read a mix such as `step:8,run16:1,generate32:1`: kind, tokens, weight. Raises MixError.

    `step` has one token; `run` and `generate` have 16 where none are named; a weight that is not named is 1.
    """
    weight_by_work: dict[Work, int] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise MixError(f"{part.strip()!r} is no part of a mix; write it as step:8,run16:1,generate32:1")
        kind, tokens, weight = match.groups()
        num_tokens = int(tokens) if tokens else _DEFAULT_TOKENS[kind]
        if num_tokens < 1 or (kind == "step" and num_tokens != 1):
            raise MixError(f"{part.strip()!r}: a step has one token, a run or a generate at least one")
        work = Work("generate" if kind == "generate" else "step", num_tokens)
        weight_by_work[work] = weight_by_work.get(work, 0) + (1 if weight is None else int(weight))
    weight_by_work = {work: weight for work, weight in weight_by_work.items() if weight > 0}
    if not weight_by_work:
        raise MixError("a mix needs a part with a weight above 0")
    return Mix(tuple(weight_by_work), tuple(weight_by_work.values()))
