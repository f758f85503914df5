"""Runs a Docker daemon of the tests' own, in a network namespace of its own.

So the machine's container engine and firewall stay as they are. Nothing outside can be reached from there:
an image is built from wheels that the machine's pip fetched before, on a base that debootstrap made. Needs
root and Debian.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import ROOT, refuse, require_program, run_program

BASE_TARBALL = ROOT / ".venv" / "python-base.tar"
BRIDGE_ADDRESS = "172.17.0.1"  # Docker's default; it exists only inside the namespace
WHEELS_PORT = 8000


class PrivateDocker:
    """Commands against the private daemon."""

    def __init__(self, folder: Path, daemon: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self._daemon = daemon
        self._environment = {
            **os.environ,
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_CONFIG": str(folder / "config"),
            "DOCKER_BUILDKIT": "0",  # what the Dockerfile must work with
        }

    def docker(self, *arguments: str) -> str:
        return self._run([str(require_program("docker")), *arguments])

    def compose(self, *arguments: str) -> str:
        return self._run([str(require_program("docker-compose", hint="make install")), *arguments])

    def inside(self, *command: str) -> str:
        """Runs a command of this machine where the containers' published ports are."""
        return self._run([*self._enter(), *command])

    @contextmanager
    def running_inside(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Keeps such a command running; ends it on leaving."""
        pipe = subprocess.PIPE
        command = (*self._enter(), *command)
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    def is_up(self) -> bool:
        command = [str(require_program("docker")), "info"]
        return subprocess.run(command, env=self._environment, capture_output=True).returncode == 0

    def _enter(self) -> list[str]:
        return [str(require_program("nsenter")), f"--net=/proc/{self._daemon.pid}/ns/net"]

    def _run(self, command: Sequence[str]) -> str:
        completed = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        return completed.stdout


@contextmanager
def private_docker() -> Iterator[PrivateDocker]:
    """Starts the daemon with a base image `python:3.11-slim`; ends it and all that it made."""
    if os.geteuid() != 0:
        refuse("the container engine of the tests' own needs root")
    dockerd = require_program("dockerd")
    unshare, ip = require_program("unshare"), require_program("ip")
    base = _base_tarball()
    folder = Path(tempfile.mkdtemp(prefix="cellserve-docker-"))  # short: a socket's path has 107 characters
    run = f"--data-root={folder}/data --exec-root={folder}/exec --host=unix://{folder}/docker.sock"
    script = f"{ip} link set lo up && exec {dockerd} {run} --pidfile={folder}/docker.pid"
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen([str(unshare), "--net", "sh", "-c", script], stdout=log, stderr=log)
    docker = PrivateDocker(folder, daemon)
    try:
        _wait_until_up(docker, daemon, folder / "dockerd.log")
        docker.docker("import", str(base), "python:3.11-slim")
        yield docker
    finally:
        if daemon.poll() is None and docker.is_up():
            containers = docker.docker("ps", "--all", "--quiet").split()
            if containers:
                docker.docker("rm", "--force", *containers)
        daemon.terminate()
        daemon.wait(timeout=30)
        shutil.rmtree(folder)


@contextmanager
def wheels_for_the_image(docker: PrivateDocker) -> Iterator[str]:
    """Fetches what the image installs with the machine's pip; gives the pip arguments that find it."""
    wheels = docker.folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={wheels}", f"--find-links={wheels}"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    # torch by itself first, by its exact version: see the Makefile. The last is what redis needs with 3.11.2, the
    # Python of the base, and not with those after it.
    for requirement in (torch, ".[server]", "hatchling", "async-timeout>=4.0.3,<6"):
        subprocess.run([*pip, "--constraint=constraints.txt", requirement], cwd=ROOT, check=True)
    listen = [str(WHEELS_PORT), f"--bind={BRIDGE_ADDRESS}", f"--directory={wheels}"]
    with docker.running_inside(sys.executable, "-m", "http.server", *listen):
        where = f"http://{BRIDGE_ADDRESS}:{WHEELS_PORT}/"
        yield f"--no-index --find-links {where} --trusted-host {BRIDGE_ADDRESS}"


def _base_tarball() -> Path:
    """A minimal Debian with Python 3.11, in the place of python:3.11-slim, which no package registry has."""
    if not BASE_TARBALL.exists():
        with tempfile.TemporaryDirectory(prefix="cellserve-base-") as folder:
            root = Path(folder) / "root"
            packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
            run_program("debootstrap", "--variant=minbase", packages, "bookworm", root)
            part = BASE_TARBALL.with_suffix(".part")
            run_program("tar", "--directory", root, "--create", "--file", part, ".")
            part.rename(BASE_TARBALL)
    return BASE_TARBALL


def _wait_until_up(docker: PrivateDocker, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not docker.is_up():
        assert daemon.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
