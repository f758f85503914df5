"""Buckets and padding of the captured tick, on a CPU: the tick is run instead of being captured and replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cellserve_model import CELLS, read_model
from cellserve_model.graphs import StepGraphs, bucket_sizes
from cellserve_model.slab import Slab
from cellserve_model.workspace import SteppingNetwork
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

CPU = torch.device("cpu")


def test_buckets_are_powers_of_two_up_to_the_largest_batch() -> None:
    assert bucket_sizes(1, single=False) == [1]
    assert bucket_sizes(8, single=False) == [1, 2, 4, 8]
    assert bucket_sizes(24, single=False) == [1, 2, 4, 8, 16, 24]
    assert bucket_sizes(24, single=True) == [24]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("cell", CELLS)
def test_padded_ticks_equal_the_transcription_and_touch_only_their_slots_and_slot_zero(
    tmp_path: Path, cell: str, kind: str, deterministic: bool
) -> None:
    is_tokens = kind == "tokens"
    write_tiny_model(
        tmp_path, cell, num_layers=2, vocab_size=7 if is_tokens else None, input_size=None if is_tokens else 3
    )
    files, oracle, random = read_model(tmp_path), Oracle(tmp_path), np.random.default_rng(0)
    with torch.inference_mode():
        network = SteppingNetwork(files.config, files.tensors, CPU, 12, deterministic=deterministic)
        slab = Slab(files.config, 30, network.width, CPU)
        graphs = StepGraphs(network, slab, capture=lambda tick: tick)
        everything = np.arange(1, 31)
        states = random.uniform(-1, 1, (30, 2, files.config.state_size)).astype(np.float32)
        slab.write(everything, states)
        for size in (1, 3, 4, 5, 12, 2):
            slots = random.permutation(everything)[:size]
            inputs = random.integers(0, 7, size) if is_tokens else random.standard_normal((size, 3)).astype(np.float32)
            num_padding_rows = graphs.run(torch.from_numpy(slots), torch.from_numpy(inputs))
            assert num_padding_rows == (12 if deterministic else {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 12: 12}[size]) - size
            expected = states.copy()
            for row, slot in enumerate(slots):
                expected[slot - 1] = oracle.run(inputs[row : row + 1], states[slot - 1]).states[-1]
            found = slab.read(everything)
            np.testing.assert_allclose(found, expected, atol=1e-6)
            others = np.setdiff1d(everything, slots) - 1
            assert found[others].tobytes() == states[others].tobytes()
            # The buffers still hold what the outputs are made from.
            top = network.views(size).top_hidden[:, : files.config.hidden_size].numpy()
            np.testing.assert_allclose(top, expected[slots - 1, -1, : files.config.hidden_size], atol=1e-6)
            states = found
