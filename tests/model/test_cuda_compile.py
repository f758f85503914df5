"""Every kernel compiles for a Hopper GPU, which takes no GPU; the interpreter does not see what a compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED_BYTES = 227 * 1024  # that one program may have on that chip


@pytest.mark.timeout(600)  # seconds of a busy machine's time for some twenty compilations
def test_kernels_compile_and_large_products_use_the_matrix_units(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels"],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    reports = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == {
        "candidate_kernel",
        "gates_kernel",
        "logits_kernel",
        "one_product_kernel",
        "read_off_kernel",
        "run_kernel",
        "sample_kernel",
        "turn_kernel",
    }
    assert {report["cell"] for report in reports} == {None, "gru", "gru_reset_after", "lstm"}
    assert max(report["shared_bytes"] for report in reports) <= MOST_SHARED_BYTES
    with_products = {report["kernel"] for report in reports if report["has_warp_group_products"]}
    assert with_products == {"candidate_kernel", "gates_kernel", "logits_kernel", "one_product_kernel", "run_kernel"}
