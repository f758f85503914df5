"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.model.loading import LoadStepper


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
