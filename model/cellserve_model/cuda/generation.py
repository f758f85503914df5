"""Samples on the device: one captured token, replayed as often as a tick has tokens.

Of a token are head, sample, step and turn: each row is then read where it was written. Symbols: B rows of a
tick, B' rows of its bucket, T tokens to sample, Q stop tokens, L layers.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.cuda.graphs import Capture, Replay
from cellserve_model.cuda.network import CudaNetwork
from cellserve_model.cuda.sampling_kernels import sample_kernel, turn_kernel
from cellserve_model.cuda.staging import upload, upload_columns
from cellserve_model.cuda.tiles import MIN_ROWS
from cellserve_model.generation import GeneratedTensors, GenerateRequest

__all__ = ["CudaGeneration"]

_TOKENS_AT_ONCE = 64  # for as many there is room; a longer tick copies them out and goes on
_STOPS_IN_GRAPH = 16  # a tick with more stop tokens than this is launched kernel by kernel
_MOVES = 2  # what `alive` is told of a row that has not come to its end
_BLOCK = 1024


class CudaGeneration:
    """The buffers and graphs of generation, on a network whose step buffers it shares."""

    def __init__(self, network: CudaNetwork, capture: Capture) -> None:
        rows, device = network.max_rows, network.device
        self._network, self._capture = network, capture
        self._replays: dict[int, Replay] = {}
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._temperatures = torch.zeros(rows, device=device)
        self._top_ks = torch.zeros(rows, dtype=torch.int32, device=device)
        self._top_ps = torch.zeros(rows, device=device)
        self._stops = torch.full((rows * _STOPS_IN_GRAPH,), -1, dtype=torch.int32, device=device)
        self._rows = torch.zeros(3, rows, dtype=torch.int32, device=device)
        self._done, self._alive, self._counts = self._rows.unbind(0)
        self._tokens = torch.zeros(_TOKENS_AT_ONCE, rows, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(_TOKENS_AT_ONCE, rows, device=device)
        self._limits = torch.zeros(rows, dtype=torch.int32, device=device)
        self._nothing = torch.zeros(rows, dtype=torch.int32, device=device)

    def warm_up(self, buckets: list[int]) -> None:
        """Capture one token of each bucket, on the scratch row."""
        for bucket in buckets:
            if bucket not in self._replays:
                self._network.step.columns(bucket).zero_()
                self._rows.zero_()
                stops = self._stops[: bucket * _STOPS_IN_GRAPH].view(bucket, _STOPS_IN_GRAPH)
                self._replays[bucket] = self._capture(functools.partial(self._launch, bucket, stops))

    def run(self, slots: NDArray[np.int64], request: GenerateRequest) -> GeneratedTensors:
        """Sample for each slot; a row that has all its tokens, or met a stop token, keeps its state from then on."""
        network, slab, num_rows, most_tokens = self._network, self._network.slab, len(slots), request.most_tokens
        bucket, device = network.bucket(num_rows), network.device
        sources, targets = slab.rows(slots), slab.take_spares(num_rows)
        columns = network.step.columns(bucket)
        upload_columns(columns, (sources, targets, np.empty(0, np.int64)))
        self._seeds[:num_rows].copy_(upload(request.seeds.view(np.int64), device, torch.int64))
        self._positions[:num_rows].copy_(upload(request.positions, device, torch.int64))
        self._temperatures[:num_rows].copy_(upload(request.temperatures, device, torch.float32))
        self._temperatures[num_rows:bucket].zero_()  # rows of padding take the likeliest, which is soonest done
        self._top_ks[:num_rows].copy_(upload(request.top_ks, device))
        self._top_ps[:num_rows].copy_(upload(request.top_ps, device, torch.float32))
        self._limits[:num_rows].copy_(upload(request.num_tokens, device))
        self._counts[:bucket].zero_()
        self._alive[:bucket].fill_(_MOVES)
        launch = self._launch_for(bucket, request.stop_tokens)
        parts = []
        for first in range(0, most_tokens, _TOKENS_AT_ONCE):
            size = min(_TOKENS_AT_ONCE, most_tokens - first)
            self._done[:bucket].zero_()
            for _ in range(size):
                launch()
            self._positions[:num_rows] += size
            parts.append((self._tokens[:size, :num_rows].long(), self._logprobs[:size, :num_rows].clone()))
        is_odd = most_tokens % 2 == 1
        ends, spares = (targets, sources) if is_odd else (sources, targets)
        if request.may_end_early:
            # A row that has stopped stands where it stopped; the slab expects it where the others are.
            states = slab.bits.index_select(0, columns[0, :num_rows])
            slab.bits.index_copy_(0, upload(ends, device, torch.int64), states)
        slab.move(slots, ends, spares)
        return GeneratedTensors(
            tokens=torch.cat([tokens for tokens, _ in parts]),
            logprobs=torch.cat([logprobs for _, logprobs in parts]),
            counts=self._counts[:num_rows].long(),
        )

    def _launch_for(self, bucket: int, stop_tokens: NDArray[np.int64]) -> Replay:
        """What makes one token: the replay of its graph, unless there are more stop tokens than that has room for."""
        num_rows, most = stop_tokens.shape
        fits = most <= _STOPS_IN_GRAPH
        stops = np.full((bucket, _STOPS_IN_GRAPH if fits else most), -1, dtype=np.int32)
        stops[:num_rows, :most] = stop_tokens
        on_device = upload(stops, self._network.device)
        if not fits:
            return functools.partial(self._launch, bucket, on_device)
        held = self._stops[: stops.size].view(stops.shape)
        held.copy_(on_device)
        return self._replays.get(bucket, functools.partial(self._launch, bucket, held))

    def _launch(self, bucket: int, stops: Tensor) -> None:
        network = self._network
        head, num_tokens = network.head, network.config.output_size
        assert head is not None and num_tokens is not None  # noqa: PT018
        sources, targets, tokens = network.step.columns(bucket).unbind(0)
        num_outputs = head.logits.shape[1]
        for first in range(0, bucket, head.max_rows):
            rows = slice(first, min(first + head.max_rows, bucket))
            network.launch_head(sources[rows], self._nothing[rows])
            sample_kernel[(rows.stop - rows.start,)](
                logits=head.logits,
                likeliest=head.likeliest,
                totals=head.totals,
                seeds=self._seeds[rows],
                positions=self._positions[rows],
                temperatures=self._temperatures[rows],
                top_ks=self._top_ks[rows],
                top_ps=self._top_ps[rows],
                stops=stops[rows],
                num_stops=stops.shape[1],
                tokens=tokens[rows],
                done=self._done[rows],
                alive=self._alive[rows],
                counts=self._counts[rows],
                limits=self._limits[rows],
                out_tokens=self._tokens[:, rows],
                out_logprobs=self._logprobs[:, rows],
                out_stride=self._tokens.shape[1],
                num_outputs=num_outputs,
                num_tokens=num_tokens,
                block=min(_BLOCK, triton.next_power_of_2(num_outputs)),
            )
        network.launch_step(bucket)
        turn_kernel[(bucket // MIN_ROWS,)](sources=sources, targets=targets, alive=self._alive, num_rows=MIN_ROWS)
