"""Starts servers by forking a process that has imported all of a server, so that a start takes tenths of a second.

What is forked is the command's own server in a process of its own, to be killed like any other; only its imports are
done already. Run as a script it is the process that forks: requests and answers are lines of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.server import Process, ServerProcess

__all__ = ["ForkedServer", "Forker"]

POLL_SECONDS = 0.01

# What a server imports at its start, and what that does not import by itself.
IMPORTED = (
    "cellserve_service.run",
    "cellserve_model.loading",
    "cellserve_service.stores.redis",
    "cellserve_service.stores.sqlite",
)


class Forker:
    """The process that forks; a context manager, at whose end everything that it has forked is killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CELLSERVE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"GRPC_VERBOSITY": "NONE"},
            cwd=Path(__file__).parents[2],
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:  # a test may kill a server from another thread
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def fork(self, arguments: list[str], log_file: Path) -> ForkedProcess:
        """A process that runs `cellserve-server` with these arguments."""
        pid = self.ask(arguments=arguments, log_file=str(log_file))
        return ForkedProcess(self, pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class ForkedProcess:
    """One that was forked, with what a test wants of a subprocess.Popen."""

    forker: Forker
    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.forker.ask(poll=self.pid)
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("cellserve-server", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return status

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class ForkedServer(ServerProcess):
    """A server that is forked."""

    forker: Forker | None = None

    def launch(self) -> Process:
        assert self.forker is not None
        self.log_file.touch()
        return self.forker.fork(self.arguments[3:], self.log_file)


def _fork_on_request() -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    # A server looks through all that is there before it serves; here it is looked through once for all servers.
    gc.collect()
    gc.freeze()
    pids: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            if pid:
                pids.remove(pid)
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                os._exit(_serve(request))
            pids.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(request: dict[str, Any]) -> int:
    from cellserve_service.run import run

    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log_file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number, file in enumerate((nothing, log, log)):
        os.dup2(file, number)
    try:
        return run(request["arguments"])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _fork_on_request()
