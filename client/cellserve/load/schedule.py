"""When requests are due: times fixed beforehand, so that a slow answer never delays the requests after it.

A generator that waits for an answer before it sends the next request leaves out the very moments in which the server is
slow ("coordinated omission", G. Tene, "How NOT to Measure Latency", 2015). Here latencies count from these times.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["even_times", "poisson_times"]


def poisson_times(rate: float, seconds: float, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Times of independent requests, ascending in [0, seconds). rate: requests a second on average."""
    # Given their number, the times of a Poisson process are independent and uniform.
    number = random.poisson(rate * seconds)
    return np.sort(random.uniform(0.0, seconds, number))


def even_times(rate: float, seconds: float, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Times of requests at equal distances, ascending in [0, seconds), the first anywhere in the first distance."""
    first = random.uniform(0.0, 1.0 / rate)
    return np.arange(first, seconds, 1.0 / rate)
