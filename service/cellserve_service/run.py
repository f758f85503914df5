"""Reads the settings, sets up the logs, and runs the server."""

import sys
from collections.abc import Sequence

import uvloop

from cellserve_service.errors import StartError
from cellserve_service.logs import set_up_logs
from cellserve_service.server import LoadSteppers, Server
from cellserve_service.settings import read_settings


def run(arguments: Sequence[str]) -> int:
    """Serve with the settings of a command line; returns the exit status."""
    settings = read_settings(arguments)
    set_up_logs(settings)
    try:
        return uvloop.run(Server(settings, LoadSteppers()).run())
    except StartError as error:
        print(f"cellserve-server: {error}", file=sys.stderr)  # noqa: T201 - it is what the command says
        return 2
