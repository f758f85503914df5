"""A stepper's buffers and the prepared network that advances a batch of rows in them by one token.

Symbols: B rows, B' rows of a product, H' hidden size (padded where deterministic), G row blocks, L layers,
S' = H' or 2H' numbers of a state, I input size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.determinism import ROW_MULTIPLE, WIDTH_MULTIPLE, largest_consistent_block
from cellserve_model.kernels import (
    LayerViews,
    PreparedLayer,
    advance_layer,
    pad_to_multiple,
    prepare_head,
    prepare_layers,
)

__all__ = ["RowViews", "SteppingNetwork"]

_MAX_KEPT_VIEWS = 1024


@dataclass(frozen=True, slots=True)
class RowViews:
    """The parts of the buffers of B rows. states: (B, L*S')."""

    states: Tensor
    products: Tensor  # (B, G*H')
    layers: list[LayerViews]  # all rows
    parts: list[list[LayerViews]]  # for each layer the rows of each product, in blocks
    input_rows: Tensor | None  # (B, I)
    top_hidden: Tensor  # (B, H'), h of the top layer
    padded_top_hidden: Tensor  # (B', H')


class SteppingNetwork:
    """A network's prepared weights and one set of buffers for at most `max_rows` rows.

    deterministic: pad rows and widths so that a row's result does not depend on the rows beside it.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        device: torch.device,
        max_rows: int,
        *,
        deterministic: bool,
    ) -> None:
        multiple = WIDTH_MULTIPLE if deterministic else 1
        self.config = config
        self.device = device
        self.max_rows = max_rows
        self.deterministic = deterministic
        self.layers = [_moved(layer, device) for layer in prepare_layers(config, tensors, multiple)]
        self.width = pad_to_multiple(config.hidden_size, multiple)  # H'
        self.state_width = config.spec.state_vectors * self.width  # S'
        self.head_weight: Tensor | None = None
        self.head_bias: Tensor | None = None
        if config.output_size is not None:
            weight, bias = prepare_head(tensors, multiple)
            self.head_weight, self.head_bias = weight.to(device), bias.to(device)
        self._block_rows = self._choose_block_rows() if deterministic else max_rows
        rows = self.padded_rows(max_rows)
        self._states = torch.zeros(rows, config.num_layers, self.state_width, device=device)
        self._products = torch.zeros(rows, config.spec.num_blocks * self.width, device=device)
        self._scratch = torch.zeros(rows, self.width, device=device)
        self._inputs: Tensor | None = None
        if config.input_size is not None:
            self._inputs = torch.zeros(rows, pad_to_multiple(config.input_size, multiple), device=device)
        self._views: dict[int, RowViews] = {}

    def padded_rows(self, num_rows: int) -> int:
        """How many rows a product over `num_rows` rows has."""
        if not self.deterministic:
            return num_rows
        if self.device.type == "cpu":
            return pad_to_multiple(num_rows, ROW_MULTIPLE)
        # A GPU library chooses its kernel by the shape of the product, so there is only one shape.
        return pad_to_multiple(num_rows, self.max_rows)

    def views(self, num_rows: int) -> RowViews:
        """The buffers' first rows; made once for a number of rows."""
        views = self._views.get(num_rows)
        if views is None:
            if len(self._views) >= _MAX_KEPT_VIEWS:
                self._views.clear()
            views = self._views[num_rows] = self._make_views(num_rows)
        return views

    def advance(
        self, views: RowViews, inputs: Tensor, after_layer: Callable[[int, LayerViews], None] | None = None
    ) -> None:
        """Advance the states in `views` by one token. inputs: (B,) int64 ids or (B, I) float32.

        after_layer: called with each layer's number while its gates stand in its views.
        """
        if views.input_rows is not None:
            views.input_rows.copy_(inputs)
        for number, layer in enumerate(self.layers):
            if layer.table is not None:
                torch.index_select(layer.table, 0, inputs, out=views.products)
            for part in views.parts[number]:
                advance_layer(self.config.cell, layer, part)
            if after_layer is not None:
                after_layer(number, views.layers[number])

    def head(self, hidden: Tensor) -> Tensor:
        """Head outputs (B', O') of hidden vectors (B', H'); padded outputs, if any, are -inf."""
        assert self.head_bias is not None and self.head_weight is not None  # noqa: PT018
        if not self.deterministic or len(hidden) <= self._block_rows:
            return torch.addmm(self.head_bias, hidden, self.head_weight)
        logits = hidden.new_empty(len(hidden), len(self.head_bias))
        for rows, out in zip(torch.split(hidden, self._block_rows), torch.split(logits, self._block_rows), strict=True):
            torch.addmm(self.head_bias, rows, self.head_weight, out=out)
        return logits

    def gates(self, number: int, part: LayerViews) -> Tensor:
        """The gates (B, num_gates, H) of a layer that has just been advanced."""
        size, spec = self.config.hidden_size, self.config.spec
        if spec.has_leak:
            leak = self.layers[number].leak
            return part.new_hidden.new_full((len(part.new_hidden), 1, size), 0.0 if leak is None else leak)
        found = [part.blocks[spec.blocks.index(name)][:, :size] for name in spec.gate_names]
        rows = part.new_hidden
        return torch.stack(found, dim=1) if found else rows.new_empty(len(rows), 0, size)

    def _choose_block_rows(self) -> int:
        if self.device.type != "cpu":
            return self.max_rows
        weights = [weight for layer in self.layers for weight in layer.recurrent_weights]
        weights += [layer.input_weight for layer in self.layers if layer.input_weight is not None]
        return largest_consistent_block(weights if self.head_weight is None else [*weights, self.head_weight])

    def _make_views(self, num_rows: int) -> RowViews:
        layers = [self._layer_views(number, 0, num_rows) for number in range(self.config.num_layers)]
        parts = [
            [
                self._layer_views(number, first, min(self._block_rows, num_rows - first))
                for first in range(0, num_rows, self._block_rows)
            ]
            for number in range(self.config.num_layers)
        ]
        return RowViews(
            states=self._states[:num_rows].flatten(1),
            products=self._products[:num_rows],
            layers=layers,
            parts=parts,
            input_rows=None if self._inputs is None else self._inputs[:num_rows, : self.config.input_size],
            top_hidden=layers[-1].new_hidden,
            padded_top_hidden=layers[-1].hidden,
        )

    def _layer_views(self, number: int, first: int, num_rows: int) -> LayerViews:
        width, padded = self.width, slice(first, first + self.padded_rows(num_rows))
        rows = slice(first, first + num_rows)
        below = self._inputs
        if number > 0:
            below = self._states[:, number - 1, :width]
        products, state = self._products, self._states[:, number]  # (., G*H'), (., S')
        candidate = slice(2 * width, 3 * width) if self.config.spec.num_blocks > 2 else slice(0, width)
        return LayerViews(
            below=None if below is None else below[padded],
            products=products[padded],
            hidden=state[padded, :width],
            gate_products=products[padded, : 2 * width],
            candidate_products=products[padded, candidate],
            gates=products[rows, : 2 * width],
            blocks=torch.split(products[rows], width, dim=1),
            new_hidden=state[rows, :width],
            memory=state[rows, width:] if self.state_width > width else None,
            scratch=self._scratch[padded],
            scratch_rows=self._scratch[rows],
        )


def _moved(layer: PreparedLayer, device: torch.device) -> PreparedLayer:
    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return PreparedLayer(
        table=to(layer.table),
        input_weight=to(layer.input_weight),
        bias=to(layer.bias),
        recurrent_weights=tuple(weight.to(device) for weight in layer.recurrent_weights),
        recurrent_bias=to(layer.recurrent_bias),
        leak=layer.leak,
    )
