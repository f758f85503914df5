"""Runs the proxies of deploy/ as they are shipped, with this machine's ports in the place of compose's names."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.programs import ROOT, require_program
from tests.support.server import free_port

__all__ = ["PROXIES", "Proxy", "ProxyProcess"]

START_SECONDS = 20.0


@dataclass(frozen=True)
class Proxy:
    """A program, its file, its arguments before the file's name, and how an address stands in the file."""

    program: str
    hint: str
    file: Path
    validating: tuple[str, ...]
    running: tuple[str, ...]
    listen: str  # what is replaced by `address` with a port of loopback
    replica: str
    address: str
    prints_when_valid: str

    def command(self, arguments: tuple[str, ...], file: Path) -> list[str]:
        return [str(require_program(self.program, hint=self.hint)), *arguments, str(file)]

    def filled_in(self, port: int, replica_ports: dict[str, int]) -> str:
        """The shipped file, listening on a port of loopback before replicas on others."""
        text = self.file.read_text()
        changes = {self.listen: port}
        changes.update({self.replica.format(name): replica_port for name, replica_port in replica_ports.items()})
        for old, new in changes.items():
            assert text.count(old) == 1, f"{self.file} names {old} {text.count(old)} times"
            text = text.replace(old, self.address.format(new))
        return text


PROXIES = (
    Proxy(
        program="envoy",
        hint="make install",
        file=ROOT / "deploy" / "envoy" / "envoy.yaml",
        validating=("--log-level", "warning", "--mode", "validate", "--config-path"),
        # Without hot restart: processes that can would share memory under one name.
        running=("--log-level", "warning", "--disable-hot-restart", "--config-path"),
        listen="{address: 0.0.0.0, port_value: 50050}",
        replica="{{address: {}, port_value: 50051}}",
        address="{{address: 127.0.0.1, port_value: {}}}",
        prints_when_valid="OK",
    ),
    Proxy(
        program="haproxy",
        hint="make system-deps",
        file=ROOT / "deploy" / "haproxy" / "haproxy.cfg",
        validating=("-c", "-f"),
        running=("-db", "-f"),
        listen=":50050",
        replica="{}:50051",
        address="127.0.0.1:{}",
        prints_when_valid="Configuration file is valid",
    ),
)


@dataclass
class ProxyProcess:
    """A proxy before the replicas server-a and server-b; a context manager that stops it."""

    proxy: Proxy
    folder: Path
    replica_ports: dict[str, int]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def write_file(self) -> Path:
        """The configuration, as it runs here."""
        file = self.folder / self.proxy.file.name
        # Envoy's administration would want the same port for every Envoy of this machine.
        text = self.proxy.filled_in(self.port, self.replica_ports).replace("port_value: 9901", "port_value: 0")
        file.write_text(text)
        return file

    def __enter__(self) -> Self:
        command = self.proxy.command(self.proxy.running, self.write_file())
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
