"""The real server on a device that fails at one token: run as a script, it takes the server's own flags."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import uvloop

from cellserve_service.server import LoadSteppers, Server
from cellserve_service.settings import Settings, read_settings
from cellserve_service.stepping import Stepper

FATAL_TOKEN = 10


class FailingStepper:
    """A stepper of the product's, until it meets the fatal token."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stepper, name)

    def submit(self, slots: Any, counts: Any, tokens: Any, wants: Any, top_k: int) -> Any:
        if np.any(tokens == FATAL_TOKEN):
            raise RuntimeError("the device has failed")
        return self._stepper.submit(slots, counts, tokens, wants, top_k)


class LoadFailingSteppers(LoadSteppers):
    """Every model is on the failing device."""

    def __call__(self, settings: Settings) -> Sequence[Stepper]:
        return [FailingStepper(stepper) for stepper in super().__call__(settings)]


if __name__ == "__main__":
    raise SystemExit(uvloop.run(Server(read_settings(sys.argv[1:]), LoadFailingSteppers()).run()))
