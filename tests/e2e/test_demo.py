"""The demo in small: the same as `make demo`, with fewer files and fewer bytes."""

import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.programs import ROOT

DEMO = [sys.executable, "-m", "demo"]


def test_the_demo_follows_files_and_carries_a_state_over_a_restart() -> None:
    finished = subprocess.run([*DEMO, "--files", "4", "--bytes", "256"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = re.findall(r"^(\S+) +256 +(\d+\.\d\d) +(\d+) +\S", finished.stdout, re.MULTILINE)
    assert len(rows) == 4
    assert all(0 < float(bits) < 8 and 1 <= int(line) <= 256 for _, bits, line in rows)
    assert "def main():" in finished.stdout
    assert "the same 64 next bytes" in finished.stdout
    figures = re.search(r"([\d,]+) tokens/s .* p50 ([\d.]+) ms, p99 ([\d.]+) ms", finished.stdout)
    assert figures is not None
    assert 0 < float(figures[2]) <= float(figures[3])
    assert finished.stderr == ""


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_stops_its_server(interruption: signal.Signals) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--files", "2", "--bytes", "100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with demo:
        assert demo.stdout is not None
        said = re.search(r"127\.0\.0\.1:(\d+)", demo.stdout.readline())
        demo.send_signal(interruption)
        demo.communicate(timeout=60)
    assert demo.returncode == 128 + interruption
    assert said is not None
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", int(said[1]))) != 0
