"""A row of the results: what was measured, beside its limit or peer, in turns in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from bench.statistics import median, median_interval, quartiles

__all__ = ["Goal", "Row"]

_MIN_PAIRS_FOR_INTERVAL: Final = 20


@dataclass(frozen=True, slots=True)
class Goal:
    """The least or the most that a row's ratio may be; of="ours": that our own figure may be."""

    sign: Literal[">=", "<="]
    value: float
    of: Literal["ratio", "ours"] = "ratio"

    def __str__(self) -> str:
        return f"{'' if self.of == 'ratio' else 'ours '}{self.sign} {self.value:,g}"


@dataclass(slots=True)
class Row:
    """Samples of ours and of what stands beside it, the i-th of each taken one after the other.

    id: of the benchmark, "K1". size: "H": 512 and the like. unit: of ours and limits. beside: what the limits are;
    "" where there is none. checked: how the answers were compared with what they must be before anything was timed.
    details: further samples by name and unit, "p99 ms" say.
    """

    id: str
    what: str
    size: Mapping[str, int | str]
    unit: str
    beside: str = ""
    goal: Goal | None = None
    checked: str = ""
    ours: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    details: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ours: float, limit: float | None = None, **details: float) -> None:
        """One turn. details: by name, with underscores for blanks."""
        self.ours.append(ours)
        if limit is not None:
            self.limits.append(limit)
        for name, value in details.items():
            self.details.setdefault(name.replace("_", " "), []).append(value)

    @property
    def name(self) -> str:
        sizes = ", ".join(
            f"{name}={value:,}" if isinstance(value, int) else str(value) for name, value in self.size.items()
        )
        return f"{self.what}; {sizes}" if sizes else self.what

    @property
    def ratios(self) -> list[float]:
        """Ours to the limit, turn by turn."""
        return [ours / limit for ours, limit in zip(self.ours, self.limits, strict=True)] if self.limits else []

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.limits else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the ratio, with 95 % confidence, where there are pairs enough."""
        return median_interval(self.ratios) if len(self.limits) >= _MIN_PAIRS_FOR_INTERVAL else None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached, by the median; None without one."""
        if self.goal is None:
            return None
        found = median(self.ours) if self.goal.of == "ours" else self.ratio
        assert found is not None
        return found >= self.goal.value if self.goal.sign == ">=" else found <= self.goal.value

    def document(self) -> dict[str, object]:
        """Everything for the JSON file."""
        return {
            "id": self.id,
            "what": self.what,
            "size": dict(self.size),
            "unit": self.unit,
            "ours": median(self.ours),
            "ours_quartiles": quartiles(self.ours),
            "beside": self.beside,
            "limit": median(self.limits) if self.limits else None,
            "limit_quartiles": quartiles(self.limits) if self.limits else None,
            "ratio": self.ratio,
            "ratio_quartiles": quartiles(self.ratios) if self.limits else None,
            "ratio_interval": self.interval,
            "goal": None if self.goal is None else str(self.goal),
            "is_met": self.is_met,
            "checked": self.checked,
            "details": {name: median(values) for name, values in self.details.items()},
            "samples": {"ours": self.ours, "limits": self.limits, **self.details},
        }
