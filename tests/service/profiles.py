"""How hard hypothesis tries: the same examples in every run, however slow the machine."""

from hypothesis import HealthCheck, settings

__all__ = ["QUICK", "STATEFUL", "WITH_STORE"]

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
STATEFUL = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
WITH_STORE = settings(STATEFUL, max_examples=150, stateful_step_count=60)
