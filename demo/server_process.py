"""Runs `cellserve-server` as a process of its own on free ports of this machine, and stops it by its own handle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cellserve_service.health_check import check

__all__ = ["ServerError", "ServerProcess"]

_START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 40.0
_POLL_SECONDS: Final = 0.1


class ServerError(Exception):
    """The server did not start, or did not stop as it should; holds what it said last."""


class ServerProcess:
    """A context manager: inside it a server runs and is healthy.

    log: the file for what the server says. arguments: further ones of its command line. program: what Python runs.
    """

    def __init__(
        self, log: Path, arguments: Sequence[str] = (), program: Sequence[str] = ("-m", "cellserve_service")
    ) -> None:
        port, metrics_port = _free_ports(2)
        self.target = f"127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._log = log
        self._command = [
            sys.executable,
            *program,
            f"--listen={self.target}",
            f"--metrics-listen=127.0.0.1:{metrics_port}",
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CELLSERVE_")}
        with self._log.open("wb") as log:
            # A group of its own: Ctrl-C reaches this process alone, which then stops the server in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            status = self._process.wait(_STOP_SECONDS)
        except BaseException as stopped:
            self._process.kill()
            self._process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            status = None
        if error is None and status != 0:
            how = f"not within {_STOP_SECONDS:g} s" if status is None else f"with status {status}"
            raise ServerError(f"the server stopped {how}\n{self._last_words()}")

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        give_up_at = time.monotonic() + _START_SECONDS
        while not check(self.target):
            if self._process.poll() is not None:
                raise ServerError(f"the server did not start\n{self._last_words()}")
            if time.monotonic() > give_up_at:
                raise ServerError(f"the server was not healthy within {_START_SECONDS:g} s\n{self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [bound.getsockname()[1] for bound in sockets]
    finally:
        for bound in sockets:
            bound.close()
