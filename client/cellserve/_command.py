"""The command `cellserve`: looks at a server and uses it from a shell."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; exit 2 with one line where the packages of the [cli] extra are missing."""
    try:
        from cellserve.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "cellserve":
            raise
        sys.stderr.write(f"cellserve needs {missing}, which is not installed: pip install 'cellserve[cli]'\n")
        raise SystemExit(2) from None
    raise SystemExit(run())
