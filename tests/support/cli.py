"""Runs the `cellserve` command in this process against a server, and reads what it writes."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from cellserve.cli.app import run
from tests.support.server import ServerProcess


@dataclass(frozen=True, slots=True)
class Cellserve:
    """The command with the server's addresses. Its methods raise AssertionError where the exit code is not 0."""

    server: ServerProcess
    capture: pytest.CaptureFixture[str]

    def run_plain(self, *arguments: str) -> str:
        """Standard output of the command with these arguments alone."""
        self.capture.readouterr()
        code = run(arguments)
        captured = self.capture.readouterr()
        assert code == 0, captured.err
        return captured.out

    def text(self, command: str, *arguments: str) -> str:
        """Standard output of a subcommand."""
        return self.run_plain(command, *self._addresses(command), *arguments)

    def json(self, command: str, *arguments: str) -> Any:
        """The one JSON document that a subcommand writes."""
        return json.loads(self.text(command, "--json", *arguments))

    def json_lines(self, command: str, *arguments: str) -> list[Any]:
        """The JSON documents that a subcommand writes, one a line."""
        return [json.loads(line) for line in self.text(command, "--json", *arguments).splitlines()]

    def refusal(self, command: str, *arguments: str) -> tuple[int, str]:
        """The exit code and the one line on standard error of a subcommand that fails; it writes nothing else."""
        self.capture.readouterr()
        code = run([command, *self._addresses(command), *arguments])
        captured = self.capture.readouterr()
        assert code != 0
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return code, line

    def _addresses(self, command: str) -> list[str]:
        if command == "top":
            return ["--metrics-url", self.server.metrics_url]
        return ["--server", self.server.target]
