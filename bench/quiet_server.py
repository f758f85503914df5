"""`python -m bench.quiet_server`: cellserve-server that counts nothing and logs nothing, to tell what that costs.

The durations of steps are still subtracted, two array operations a frame; they are then thrown away.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Final

from cellserve_service import handlers, statistics, ticks
from cellserve_service._command import main

_COUNTING: Final[tuple[tuple[type | ModuleType, str], ...]] = (
    (statistics.Histogram, "observe"),
    (statistics.Histogram, "observe_one"),
    (statistics.ModelStatistics, "count_tick"),
    (statistics.Statistics, "count_failures"),
    (ticks, "_count_begun"),
)


def _ignore(*_: object) -> None:
    pass


def _uncounted(_: object, behavior: handlers.Behavior, *__: object) -> handlers.Behavior:
    return behavior


if __name__ == "__main__":
    for owner, name in _COUNTING:
        assert callable(getattr(owner, name)), f"{name} is gone: what counts now?"
        setattr(owner, name, _ignore)
    assert callable(handlers._counted)
    setattr(handlers, "_counted", _uncounted)  # noqa: B010 - to mypy a function is not a variable
    sys.argv.append("--log-level=error")
    main()
