"""Fixtures of the model tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.model.loading import LoadStepper

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which may be before tests.support.interpreter
if sys.platform != "linux":
    collect_ignore_glob = ["test_cuda_*", "test_bench_gpu*"]  # Triton is only there


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small products gain nothing from threads, and other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load() -> LoadStepper:
    return LoadStepper()
