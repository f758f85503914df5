"""Runs the head for what a tick asks of it, and makes the record that the tick is answered with.

Symbols: M hidden vectors that the head runs on, O outputs, L layers, W padded hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.cuda.network import CudaNetwork
from cellserve_model.cuda.staging import upload, upload_columns
from cellserve_model.plan import HeadPlan
from cellserve_model.ticks import ModelInfo, StepResult

__all__ = ["OutputTensors", "run_head"]


@dataclass(slots=True)
class OutputTensors:
    """What a tick gives, on the device and then on the host; None where nobody asked.

    The first two are of every hidden vector that the head ran on, the others of the tokens that asked.
    """

    likeliest: Tensor | None = None  # (M,) int32
    logprobs: Tensor | None = None  # (M,) float32
    logits: Tensor | None = None  # (n, O) float32
    top_tokens: Tensor | None = None  # (n, k) int64
    top_logprobs: Tensor | None = None  # (n, k) float32
    states: Tensor | None = None  # (n, L, state_size) float32
    gates: Tensor | None = None  # (n, gates, L, H) float32

    def to_host(self) -> OutputTensors:
        """Enqueue the copies to pinned memory; the values are there once the stream has got so far."""
        return OutputTensors(
            **{
                field.name: None if tensor is None else tensor.to("cpu", non_blocking=True)
                for field in fields(self)
                for tensor in (getattr(self, field.name),)
            }
        )

    def result(
        self, info: ModelInfo, head: HeadPlan | None, num_padding_rows: int, compute_seconds: float
    ) -> StepResult:
        """The record for whoever drives the stepper; only on the host, and only of what was asked."""
        nothing = slice(0, 0)
        likeliest = np.empty(0, np.int32) if self.likeliest is None else self.likeliest.numpy()
        logprobs = np.empty(0, np.float32) if self.logprobs is None else self.logprobs.numpy()
        gates_shape = (len(info.gate_names), info.num_layers, info.hidden_size)
        return StepResult(
            next_tokens=likeliest[nothing if head is None else head.next_tokens].astype(np.uint32),
            top_tokens=_array(self.top_tokens, 0).astype(np.uint32),
            top_logprobs=_array(self.top_logprobs, 0),
            logprobs=logprobs[nothing if head is None else head.logprobs],
            logits=_array(self.logits, info.output_size or 0),
            states=_array(self.states, info.num_layers, info.state_size),
            gates=_array(self.gates, *gates_shape),
            num_padding_rows=num_padding_rows,
            compute_seconds=compute_seconds,
        )


def run_head(
    network: CudaNetwork,
    replays: Mapping[int, Callable[[], None]],
    head: HeadPlan,
    rows: NDArray[np.int64],
    storage: Tensor | None,
    tokens: NDArray[np.generic],
    top_k: int,
) -> OutputTensors:
    """Run the head on M hidden vectors.

    rows: (M,), where each stands, in `storage` (., 2, W) or in the slab where that is None. replays: for a
    bucket of rows in the slab the captured launch, where there is one. tokens: (N,) as the tick was given them.
    """
    buffers, num_outputs = network.head, network.config.output_size
    assert buffers is not None
    observed = np.zeros(len(rows), dtype=np.int64)
    logprob_places = np.arange(len(rows))[head.logprobs]
    if len(logprob_places):
        observed[logprob_places] = tokens[head.logprob_tokens]
    parts = []
    for first in range(0, len(rows), buffers.max_rows):
        size = min(buffers.max_rows, len(rows) - first)
        bucket, inside = network.bucket(size), slice(first, first + size)
        columns = buffers.columns(bucket)
        upload_columns(columns, (rows[inside], observed[inside]))
        launch = functools.partial(network.launch_head, columns[0], columns[1], storage)
        (launch if storage is not None else replays.get(bucket, launch))()
        part = OutputTensors(likeliest=buffers.likeliest[:size], logprobs=buffers.logprobs[:size])
        if size < len(rows):  # the next part overwrites the buffers
            part = OutputTensors(likeliest=buffers.likeliest[:size].clone(), logprobs=buffers.logprobs[:size].clone())
        wanted = _within(np.arange(len(rows))[head.logits], first, size)
        if len(wanted):
            part.logits = buffers.logits.index_select(0, upload(wanted, network.device))[:, :num_outputs]
        wanted = _within(np.arange(len(rows))[head.top_k], first, size)
        if len(wanted):
            on_device = upload(wanted, network.device)
            values, part.top_tokens = buffers.logits.index_select(0, on_device).topk(top_k, dim=1)
            part.top_logprobs = values - buffers.totals.index_select(0, on_device).unsqueeze(1)
        parts.append(part)
    return parts[0] if len(parts) == 1 else _joined(parts)


def _within(places: NDArray[np.int64], first: int, size: int) -> NDArray[np.int64]:
    """The places within [first, first + size), counted from there. places: rising."""
    low, high = np.searchsorted(places, [first, first + size])
    return places[low:high] - first


def _joined(parts: list[OutputTensors]) -> OutputTensors:
    """The parts of a tick as one: places rise, so each output's parts join in order."""
    joined = OutputTensors()
    for field in fields(OutputTensors):
        found = [tensor for part in parts if (tensor := getattr(part, field.name)) is not None]
        setattr(joined, field.name, torch.cat(found) if found else None)
    return joined


def _array(tensor: Tensor | None, *shape_of_one: int) -> NDArray[np.float32]:
    if tensor is None:
        return np.empty((0, *shape_of_one), np.float32)
    array: NDArray[np.float32] = tensor.numpy()
    return array
