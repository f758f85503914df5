"""`cellserve-server` with its one front end in a process beside the engine's: for comparison only."""

import os
import sys

import uvloop

# As the command does, before grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from cellserve_service.logs import set_up_logs
from cellserve_service.server import LoadSteppers, Server
from cellserve_service.settings import read_settings

if __name__ == "__main__":
    settings = read_settings(sys.argv[1:])
    set_up_logs(settings)

    async def _serve() -> int:
        return await Server(settings, LoadSteppers(), has_workers_beside=True).run()

    raise SystemExit(uvloop.run(_serve()))
