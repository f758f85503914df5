"""Medians, quartiles, and where a median lies with 95 % confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

__all__ = ["median", "median_interval", "quartiles"]

_RESAMPLES: Final = 10_000


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Between these lies the middle half."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence: the percentile bootstrap (Efron 1979), with fixed random numbers."""
    column = np.asarray(values, np.float64)
    random = np.random.default_rng(0)
    medians = np.median(column[random.integers(0, len(column), (_RESAMPLES, len(column)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)
