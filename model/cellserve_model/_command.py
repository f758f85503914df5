"""The command `cellserve-model`: trains the bundled model and shows what a model directory holds."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; exit 2 with one line where the packages of the [server] extra are missing."""
    try:
        from cellserve_model._command_app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "cellserve_model":
            raise
        sys.stderr.write(f"cellserve-model needs {missing}, which is not installed: pip install 'cellserve[server]'\n")
        raise SystemExit(2) from None
    app()
