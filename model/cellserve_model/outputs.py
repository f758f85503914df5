"""Remembers what a tick's outputs need while it runs, and computes them once at its end.

Symbols: M moments (hidden vectors) that the head runs on, H' hidden size, O' outputs, L layers, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellserve_model.kernels import LayerViews
from cellserve_model.plan import Capture, HeadPlan, Places, TickPlan
from cellserve_model.slab import to_tensor
from cellserve_model.workspace import RowViews, SteppingNetwork

__all__ = ["OutputTensors", "Recorder"]

# Bounds what the head of a large vocabulary takes: 16 MiB of float32 at a time.
_MAX_LOGITS_AT_ONCE = 4 * 2**20


@dataclass(slots=True)
class OutputTensors:
    """The outputs of a tick, None where nobody asked."""

    next_tokens: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None
    logprobs: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None
    gates: Tensor | None = None


class Recorder:
    """Follows one tick: `before` its first step, `after` each, then `finish`."""

    def __init__(self, network: SteppingNetwork, plan: TickPlan) -> None:
        self._network = network
        self._plan = plan
        config, head = network.config, plan.head
        self._direct = head is not None and _is_direct(plan, head)
        self._moments: Tensor | None = None  # (M, H')
        if head is not None and not self._direct:
            rows = network.padded_rows(head.num_moments)
            self._moments = torch.empty(rows, network.width)
        self.outputs = OutputTensors()
        if plan.states is not None:
            shape = (plan.states.num_tokens, config.num_layers, config.state_size)
            self.outputs.states = torch.empty(shape)
        if plan.gates is not None:
            num_gates = len(config.spec.gate_names)
            shape4 = (plan.gates.num_tokens, num_gates, config.num_layers, config.hidden_size)
            self.outputs.gates = torch.empty(shape4)

    def before(self, views: RowViews) -> None:
        """Remember what is asked of the states before the first token."""
        if self._moments is not None and self._plan.head is not None:
            self._put(self._moments, self._plan.head.captures[0], views.top_hidden)

    def after(self, num_consumed: int, views: RowViews) -> None:
        """Remember what is asked of the states after `num_consumed` tokens."""
        if self._moments is not None and self._plan.head is not None:
            self._put(self._moments, self._plan.head.captures[num_consumed], views.top_hidden)
        elif self._direct:
            self._moments = views.padded_top_hidden
        if self.outputs.states is not None and self._plan.states is not None:
            capture = self._plan.states.captures[num_consumed]
            if capture is not None:
                self._put(self.outputs.states, capture, self._unpadded(views.states))

    def after_layer(self, num_consumed: int, number: int, part: LayerViews) -> None:
        """Remember the gates of one layer while they stand in its buffers."""
        assert self.outputs.gates is not None and self._plan.gates is not None  # noqa: PT018
        capture = self._plan.gates.captures[num_consumed]
        if capture is not None:
            self._put(self.outputs.gates[:, :, number], capture, self._network.gates(number, part))

    def finish(self, tokens: Tensor | None, top_k: int) -> OutputTensors:
        """Run the head over what was remembered. tokens: (N,) int64 ids, as the tick was given them."""
        head = self._plan.head
        if head is None or self._moments is None:
            return self.outputs
        network = self._network
        num_outputs = network.head_bias.shape[0] if network.head_bias is not None else 1
        rows_at_once = network.padded_rows(max(1, _MAX_LOGITS_AT_ONCE // num_outputs))
        observed = None
        if tokens is not None and _size(head.logprob_tokens):
            observed = self._select(tokens, head.logprob_tokens)
        if head.num_moments <= rows_at_once:
            self._chunk(self.outputs, head, self._moments, observed, top_k)
        else:
            self._chunks(head, observed, top_k, rows_at_once)
        return self.outputs

    def _chunks(self, head: HeadPlan, observed: Tensor | None, top_k: int, rows_at_once: int) -> None:
        """The same as one chunk, part after part: places rise, so the parts of each output join in order."""
        assert self._moments is not None
        parts = []
        for first in range(0, head.num_moments, rows_at_once):
            size = min(rows_at_once, head.num_moments - first)
            logprobs, inside = _part(head.logprobs, first, size)
            piece = HeadPlan(
                num_moments=size,
                captures=[],
                next_tokens=_part(head.next_tokens, first, size)[0],
                top_k=_part(head.top_k, first, size)[0],
                logits=_part(head.logits, first, size)[0],
                logprobs=logprobs,
                logprob_tokens=inside,
            )
            part = OutputTensors()
            moments = self._moments[first : first + self._network.padded_rows(size)]
            self._chunk(part, piece, moments, None if observed is None else observed[inside], top_k)
            parts.append(part)
        for name in ("next_tokens", "top_tokens", "top_logprobs", "logprobs", "logits"):
            found = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            setattr(self.outputs, name, torch.cat(found) if found else None)

    def _chunk(
        self, outputs: OutputTensors, head: HeadPlan, moments: Tensor, observed: Tensor | None, top_k: int
    ) -> None:
        logits = self._network.head(moments)  # (M', O')
        if _size(head.next_tokens):
            outputs.next_tokens = _argmax(self._select(logits, head.next_tokens))
        if _size(head.logits):
            # Never a view that would keep a whole padded product alive.
            outputs.logits = self._select(logits, head.logits)[:, : self._network.config.output_size].contiguous()
        if not (_size(head.top_k) or _size(head.logprobs)):
            return
        totals = torch.logsumexp(logits, dim=1, keepdim=True)  # (M', 1)
        if _size(head.top_k):
            values, outputs.top_tokens = self._select(logits, head.top_k).topk(top_k, dim=1)
            outputs.top_logprobs = values - self._select(totals, head.top_k)
        if _size(head.logprobs):
            assert observed is not None
            chosen = self._select(logits, head.logprobs).gather(1, observed.unsqueeze(1))
            outputs.logprobs = (chosen - self._select(totals, head.logprobs)).squeeze(1)

    def _put(self, target: Tensor, capture: Capture | None, source: Tensor) -> None:
        if capture is None:
            return
        if capture.ranks is not None:
            source = source.index_select(0, to_tensor(capture.ranks))
        if isinstance(capture.places, slice):
            target[capture.places].copy_(source)
        else:
            target.index_copy_(0, to_tensor(capture.places), source)

    def _select(self, source: Tensor, places: Places) -> Tensor:
        return source[places] if isinstance(places, slice) else source.index_select(0, to_tensor(places))

    def _unpadded(self, states: Tensor) -> Tensor:
        """(B, L*S') to (B, L, state_size)."""
        config, width = self._network.config, self._network.width
        if width == config.hidden_size:
            return states.view(-1, config.num_layers, config.state_size)
        shaped = states.view(-1, config.num_layers, config.spec.state_vectors, width)
        return shaped[..., : config.hidden_size].flatten(2)


def _is_direct(plan: TickPlan, head: HeadPlan) -> bool:
    """Whether the head can run on the states where they stand: one step, all rows, nothing from before."""
    after = head.captures[-1]
    return (
        len(plan.step_sizes) == 1
        and head.captures[0] is None
        and after is not None
        and after.ranks is None
        and isinstance(after.places, slice)
    )


def _argmax(logits: Tensor) -> Tensor:
    # numpy's is vectorised over a row, torch's takes as long as the product before it.
    return torch.from_numpy(logits.numpy().argmax(1))


def _size(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _part(places: Places, first: int, size: int) -> tuple[Places, slice]:
    """The places within [first, first + size), counted from there, and which of all places they are."""
    if isinstance(places, slice):
        start = min(max(places.start, first), first + size)
        stop = max(min(places.stop, first + size), start)
        inside = slice(max(0, start - places.start), max(0, stop - places.start))
        return slice(start - first, stop - first), inside
    low, high = np.searchsorted(places, [first, first + size])
    return places[low:high] - first, slice(int(low), int(high))
