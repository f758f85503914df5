"""CUDA graphs of the plain tick, one for each bucket: gather, step every layer, scatter, in one launch.

A bucket is a padded number of rows; padding rows read and write slot 0. Symbols: B rows, I input size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cellserve_model.slab import Slab
from cellserve_model.workspace import SteppingNetwork

__all__ = ["StepGraphs", "bucket_sizes", "cuda_capture"]

Tick = Callable[[], None]


def bucket_sizes(max_rows: int, *, single: bool) -> list[int]:
    """Powers of two below `max_rows`, then `max_rows` itself; only that one where `single`."""
    sizes = [] if single else [2**power for power in range(max_rows.bit_length()) if 2**power < max_rows]
    return [*sizes, max_rows]


def cuda_capture(device: torch.device) -> Callable[[Tick], Tick]:
    """Returns a function that captures a tick as a CUDA graph, all in one memory pool, and returns its replay."""
    pool = torch.cuda.graph_pool_handle()

    def capture(tick: Tick) -> Tick:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose kernels and allocate on first use, which a capture forbids
                tick()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            tick()
        return graph.replay

    return capture


class StepGraphs:
    """The captured ticks of one stepper, sharing its slab and buffers.

    capture: makes a replay of a tick, `cuda_capture` on a GPU.
    """

    def __init__(self, network: SteppingNetwork, slab: Slab, capture: Callable[[Tick], Tick]) -> None:
        self._network = network
        self._slab = slab
        config, rows, device = network.config, network.max_rows, network.device
        self._slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self._inputs = (
            torch.zeros(rows, dtype=torch.int64, device=device)
            if config.input_size is None
            else torch.zeros(rows, config.input_size, device=device)
        )
        buckets = bucket_sizes(rows, single=network.deterministic)
        # The largest first, so that the smaller ones fit into its memory.
        self._replays = {bucket: capture(functools.partial(self._tick, bucket)) for bucket in reversed(buckets)}
        self._buckets = buckets

    def run(self, slots: Tensor, inputs: Tensor) -> int:
        """Step `slots` (B,) int64 by `inputs`, (B,) ids or (B, I). Returns the number of padding rows.

        The network's first B rows hold the new states until the next tick.
        """
        num_rows = len(slots)
        bucket = next(size for size in self._buckets if size >= num_rows)
        self._slots[:num_rows].copy_(slots)
        self._slots[num_rows:bucket].zero_()
        self._inputs[:num_rows].copy_(inputs)
        self._replays[bucket]()
        return bucket - num_rows

    def _tick(self, bucket: int) -> None:
        views, slots = self._network.views(bucket), self._slots[:bucket]
        self._slab.gather(slots, views.states)
        self._network.advance(views, self._inputs[:bucket])
        self._slab.scatter(slots, views.states)
