"""Starts the real server process on free loopback ports, and stops it by its own handle."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

START_SECONDS = 60.0
STOP_SECONDS = 45.0
# How many front-end processes a server has in tests that do not say so themselves: `make test-workers`.
WORKERS = int(os.environ.get("CELLSERVE_TEST_WORKERS", "1"))


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Process(Protocol):
    """What is wanted of a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


@dataclass
class ServerProcess:
    """A `cellserve-server` process; a context manager that stops it. `settings` are its flags, in snake case."""

    log_file: Path
    models: Path | None = None
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    process: Process | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def arguments(self) -> list[str]:
        """The whole command line."""
        settings = {
            "listen": self.target,
            "metrics_listen": f"127.0.0.1:{self.metrics_port}",
            "num_threads": 1,
            "workers": WORKERS,
            **({} if self.models is None else {"models": str(self.models)}),
            **self.settings,
        }
        command = [sys.executable, "-m", "cellserve_service"]
        for name, value in settings.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
        return command

    def start(self) -> "ServerProcess":
        """Start it, perhaps again, and wait until it serves; AssertionError with its log when it does not."""
        said_before = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.process = self.launch()
        deadline = time.monotonic() + START_SECONDS
        while not re.search(rb"\bserving\b", self.log_file.read_bytes()[said_before:]):
            status = self.process.poll()
            assert status is None, f"the server ended with {status}:\n{self.log}"
            assert time.monotonic() < deadline, f"the server did not start:\n{self.log}"
            time.sleep(0.02)
        return self

    def launch(self) -> Process:
        """Start the process, which says to the log file whatever it has to say."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CELLSERVE_")}
        with self.log_file.open("ab") as log:
            return subprocess.Popen(self.arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def terminate(self) -> None:
        """Send SIGTERM: the server drains."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the process to end; returns its exit status."""
        assert self.process is not None
        return self.process.wait(STOP_SECONDS)

    def stop(self) -> int:
        """Stop it in order; returns its exit status."""
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def metrics(self) -> str:
        """The text of its Prometheus endpoint."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def __enter__(self) -> "ServerProcess":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
