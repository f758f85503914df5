"""The command `cellserve-server`."""

import importlib.util
import os
import sys

NEEDED = ("torch", "pydantic_settings", "prometheus_client", "structlog", "grpc_health", "safetensors")


def main() -> None:
    """Start the server. Exits with 2 when it cannot start, 1 when it failed while serving."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(  # noqa: T201 - it is what the command says
            f"cellserve-server: {', '.join(missing)} missing; install with: pip install 'cellserve[server]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # Read when grpc is imported: its core tells of a taken port, say, by lines of its own beside our one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from cellserve_service.run import run

    raise SystemExit(run(sys.argv[1:]))
