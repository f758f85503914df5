"""The processes that a process has started, and what they have loaded."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

__all__ = ["children", "has_loaded", "is_running", "remote_ports", "wait_until_gone"]

WAIT_SECONDS = 15.0


def children(pid: int) -> list[int]:
    """The processes that run and whose parent this is."""
    found = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return sorted(child for child in found if _state(child) == ("alive", pid))


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    state = _state(pid)
    return state is not None and state[0] == "alive"


def has_loaded(pid: int, name: str) -> bool:
    """Whether a shared library with this in its path is part of the process."""
    return name in Path(f"/proc/{pid}/maps").read_text()


def remote_ports(pid: int) -> set[int]:
    """The ports at the other ends of a process' connections."""
    ports: dict[str, int] = {}
    # IPv4 may be under IPv6, mapped.
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    for fields in map(str.split, lines):
        ports[f"socket:[{fields[9]}]"] = int(fields[2].rpartition(":")[2], 16)
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(ports.get(str(link.readlink()), 0))
    return found - {0}


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"{left} still run"
        time.sleep(0.02)


def _state(pid: int) -> tuple[str, int] | None:
    """Whether a process is alive or has ended, and its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ("ended" if fields[0] in "ZX" else "alive"), int(fields[1])
