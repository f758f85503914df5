"""What the engine's process and a front-end process say to each other beside commands and events."""

from dataclasses import dataclass

from cellserve_service.limits import EngineLimits
from cellserve_service.settings import Settings
from cellserve_service.statistics import FrontStatistics


@dataclass(frozen=True, slots=True)
class Facts:
    """What a front end must know of the engine. models: each a serialized cellserve.v1.Model, in the engine's order."""

    models: tuple[bytes, ...]
    limits: EngineLimits


# To a worker.


@dataclass(frozen=True, slots=True)
class Serve:
    """Begin. listen: the address with its port. number: of this worker, and of no other before or after it."""

    settings: Settings
    listen: str
    number: int
    facts: Facts


@dataclass(frozen=True, slots=True)
class GoUnhealthy:
    """Let health checks say NOT_SERVING."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the streams, wait so long for their last answers to be taken, and exit."""

    patience_seconds: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The engine has failed: tell all, and exit."""


@dataclass(frozen=True, slots=True)
class Count:
    """Send what was counted."""


ToWorker = Serve | GoUnhealthy | Stop | Fail | Count


# From a worker.


@dataclass(frozen=True, slots=True)
class Serving:
    """It serves."""


@dataclass(frozen=True, slots=True)
class CannotServe:
    """It cannot start, in one line."""

    message: str


@dataclass(frozen=True, slots=True)
class Counted:
    """Everything since it began."""

    statistics: FrontStatistics


@dataclass(frozen=True, slots=True)
class Ended:
    """It has stopped. in_time: every call had ended by then."""

    in_time: bool


FromWorker = Serving | CannotServe | Counted | Ended
