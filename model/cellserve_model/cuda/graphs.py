"""Captures launches as CUDA graphs: what a graph replays costs the host one call, however many kernels it has."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Capture", "Replay", "capture_in_one_pool"]

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


def capture_in_one_pool(device: torch.device) -> Capture:
    """Returns a function that captures launches as a graph, all in one memory pool, and returns its replay."""
    pool = torch.cuda.graph_pool_handle()

    def capture(launch: Replay) -> Replay:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            launch()  # kernels are compiled and loaded on first use, which a capture forbids
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            launch()
        return graph.replay

    return capture
