"""Loads a server and tells how it bore it: requests of a mix, on a schedule or one after the other.

`cellserve bench` and the project's own benchmarks drive servers with it.
"""

from __future__ import annotations

from cellserve.load.driving import Driver, Loaded, run_precisely
from cellserve.load.mix import Mix, MixError, Work, parse_mix
from cellserve.load.results import LoadResult, Recorder
from cellserve.load.schedule import even_times, poisson_times
from cellserve.load.search import Trial, most_sessions

__all__ = [
    "Driver",
    "LoadResult",
    "Loaded",
    "Mix",
    "MixError",
    "Recorder",
    "Trial",
    "Work",
    "even_times",
    "most_sessions",
    "parse_mix",
    "poisson_times",
    "run_precisely",
]
