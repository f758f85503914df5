"""A stepper's buffers and the prepared network that advances a batch of rows in them by one token.

Symbols: B rows, B' rows of a product, H' hidden size (padded where deterministic), G row blocks, L layers,
S' = H' or 2H' numbers of a state, I input size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.determinism import WIDTH_MULTIPLE, choose_blocking
from cellserve_model.kernels import (
    LayerViews,
    advance_layer,
    pad_to_multiple,
    part_sizes,
    prepare_head,
    prepare_layers,
)
from cellserve_model.lone import bind_lone, bind_lone_fill
from cellserve_model.products import Weight, bind_add, bind_biased, bind_fill, fastest, rounded

__all__ = ["RowViews", "SteppingNetwork"]

_MAX_KEPT_VIEWS = 1024
# From here on a single row, too, is multiplied with rounded weights where they are asked for.
_MANY_BYTES = 8 * 2**20
# Bounds what the input products of a long run take: 16 MiB of float32 at a time.
_MAX_PROJECTED_NUMBERS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class RowViews:
    """The parts of the buffers of B rows. states: (B, L*S')."""

    states: Tensor
    products: Tensor  # (B, G*H')
    layers: list[LayerViews]  # all rows
    fill: list[list[Callable[[], None]]]  # for each layer, what puts W_x x_t + b into products, block by block
    advance: list[list[Callable[[], None]]]  # for each layer, what advances its rows from there
    input_rows: Tensor | None  # (B, I)
    top_hidden: Tensor  # (B, H'), h of the top layer
    padded_top_hidden: Tensor  # (B', H')


class SteppingNetwork:
    """A network's prepared weights and one set of buffers for at most `max_rows` rows.

    deterministic: pad rows and widths so that a row's result does not depend on the rows beside it. bfloat16: round
    the weights of products with hidden vectors, and those vectors as they are multiplied; states, tables, sums and
    the head stay float32. Not both.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        max_rows: int,
        *,
        deterministic: bool,
        bfloat16: bool = False,
    ) -> None:
        multiple = WIDTH_MULTIPLE if deterministic else 1
        self.config = config
        self.max_rows = max_rows
        self.deterministic = deterministic
        self._bfloat16 = bfloat16
        self.layers = prepare_layers(config, tensors, multiple)
        self.width = pad_to_multiple(config.hidden_size, multiple)  # H'
        self.state_width = config.spec.state_vectors * self.width  # S'
        self.head_weight: Tensor | None = None
        self.head_bias: Tensor | None = None
        if config.output_size is not None:
            self.head_weight, self.head_bias = prepare_head(tensors, multiple)
        self._row_multiple, self._block_rows, prepare = self._choose_products()
        of_hidden = rounded if bfloat16 else prepare
        self._recurrent = [[of_hidden(weight) for weight in layer.recurrent_weights] for layer in self.layers]
        self._input = [
            None if layer.input_weight is None else (of_hidden if number > 0 else prepare)(layer.input_weight)
            for number, layer in enumerate(self.layers)
        ]
        self._head = None if self.head_weight is None else prepare(self.head_weight)
        rows = self.padded_rows(max_rows)
        self._states = torch.zeros(rows, config.num_layers, self.state_width)
        self._products = torch.zeros(rows, config.spec.num_blocks * self.width)
        self._scratch = torch.zeros(rows, self.width)
        self._inputs: Tensor | None = None
        if config.input_size is not None:
            self._inputs = torch.zeros(rows, pad_to_multiple(config.input_size, multiple))
        self._views: dict[int, RowViews] = {}

    def padded_rows(self, num_rows: int) -> int:
        """How many rows a product over `num_rows` rows has."""
        return pad_to_multiple(num_rows, self._row_multiple)

    def views(self, num_rows: int) -> RowViews:
        """The buffers' first rows; made once for a number of rows."""
        views = self._views.get(num_rows)
        if views is None:
            if len(self._views) >= _MAX_KEPT_VIEWS:
                self._views.clear()
            views = self._views[num_rows] = self._make_views(num_rows)
        return views

    def advance(
        self,
        views: RowViews,
        inputs: Tensor,
        after_layer: Callable[[int, LayerViews], None] | None = None,
        *,
        is_projected: bool = False,
    ) -> None:
        """Advance the states in `views` by one token. inputs: (B,) int64 ids or (B, I) float32.

        after_layer: called with each layer's number while its gates stand in its views. is_projected: whether
        `inputs` are already W_x x_t + b of the first layer, (B, G*H').
        """
        if is_projected:
            views.products.copy_(inputs)
        elif views.input_rows is not None:
            views.input_rows.copy_(inputs)
        for number, layer in enumerate(self.layers):
            if layer.table is not None:
                torch.index_select(layer.table, 0, inputs, out=views.products)
            if number > 0 or not is_projected:
                for fill in views.fill[number]:
                    fill()
            for advance in views.advance[number]:
                advance()
            if after_layer is not None:
                after_layer(number, views.layers[number])

    def project(self, inputs: Tensor, step_sizes: Sequence[int]) -> Iterator[Tensor]:
        """The input products of a run's steps, W_x x_t + b of the first layer, many steps in one product.

        inputs: (N, I), step after step, of which each has step_sizes[t] rows. Yields (step_sizes[t], G*H').
        """
        weight, bias = self._input[0], self.layers[0].bias
        assert weight is not None and bias is not None  # noqa: PT018
        tokens_at_once = max(self.max_rows, _MAX_PROJECTED_NUMBERS // len(bias))
        first = end = 0
        products = inputs
        for size in step_sizes:
            if first + size > end:
                begin, end = first, min(first + tokens_at_once, len(inputs))
                rows = inputs.new_zeros(self.padded_rows(end - begin), weight.plain.shape[0])
                rows[: end - begin, : inputs.shape[1]] = inputs[begin:end]
                products = self._multiply(weight, bias, rows)
            yield products[first - begin : first - begin + size]
            first += size

    def head(self, hidden: Tensor) -> Tensor:
        """Head outputs (B', O') of hidden vectors (B', H'); padded outputs, if any, are -inf."""
        assert self.head_bias is not None and self._head is not None  # noqa: PT018
        return self._multiply(self._head, self.head_bias, hidden)

    def gates(self, number: int, part: LayerViews) -> Tensor:
        """The gates (B, num_gates, H) of a layer that has just been advanced."""
        size, spec = self.config.hidden_size, self.config.spec
        if spec.has_leak:
            leak = self.layers[number].leak
            return part.new_hidden.new_full((len(part.new_hidden), 1, size), 0.0 if leak is None else leak)
        found = [part.blocks[spec.blocks.index(name)][:, :size] for name in spec.gate_names]
        rows = part.new_hidden
        return torch.stack(found, dim=1) if found else rows.new_empty(len(rows), 0, size)

    def _multiply(self, weight: Weight, bias: Tensor, rows: Tensor) -> Tensor:
        """`bias` + `rows` W, in blocks where deterministic. rows: (B', K). Returns (B', N)."""
        products = rows.new_empty(len(rows), len(bias))
        if len(rows) <= self._block_rows or not self.deterministic:
            return bind_biased(weight, bias, rows, products, len(rows))()
        for part, out in zip(torch.split(rows, self._block_rows), torch.split(products, self._block_rows), strict=True):
            bind_fill(weight, bias, part, out, len(part))()
        return products

    def _choose_products(self) -> tuple[int, int, Callable[[Tensor], Weight]]:
        """The multiple that rows are padded to, the most rows of a product, and how weights are prepared for it."""
        if not self.deterministic:
            return 1, self.max_rows, fastest
        weights = [weight for layer in self.layers for weight in layer.recurrent_weights]
        weights += [layer.input_weight for layer in self.layers if layer.input_weight is not None]
        blocking = choose_blocking(weights if self.head_weight is None else [*weights, self.head_weight])
        return blocking.row_multiple, blocking.block_rows, blocking.prepare

    def _make_views(self, num_rows: int) -> RowViews:
        layers = [self._layer_views(number, 0, num_rows) for number in range(self.config.num_layers)]
        blocks = [(first, min(self._block_rows, num_rows - first)) for first in range(0, num_rows, self._block_rows)]
        return RowViews(
            states=self._states[:num_rows].flatten(1),
            products=self._products[:num_rows],
            layers=layers,
            fill=[self._bind_fill(number, blocks) for number in range(self.config.num_layers)],
            advance=[self._bind_advance(number, blocks) for number in range(self.config.num_layers)],
            input_rows=None if self._inputs is None else self._inputs[:num_rows, : self.config.input_size],
            top_hidden=layers[-1].new_hidden,
            padded_top_hidden=self._states[: self.padded_rows(num_rows), -1, : self.width],
        )

    def _bind_fill(self, number: int, blocks: Sequence[tuple[int, int]]) -> list[Callable[[], None]]:
        weight, bias = self._input[number], self.layers[number].bias
        if weight is None or bias is None:
            return []
        below = self._inputs if number == 0 else self._states[:, number - 1, : self.width]
        assert below is not None
        if self._is_lone(number, blocks):
            return [bind_lone_fill(weight.plain, bias, below[:1], self._products[:1])]
        filling = []
        for first, size in blocks:
            padded = slice(first, first + self.padded_rows(size))
            filling.append(bind_fill(weight, bias, below[padded], self._products[padded], size))
        return filling

    def _bind_advance(self, number: int, blocks: Sequence[tuple[int, int]]) -> list[Callable[[], None]]:
        cell, layer = self.config.cell, self.layers[number]
        if self._is_lone(number, blocks):
            return [bind_lone(cell, layer, self._layer_views(number, 0, 1), self._products[:1])]
        return [
            functools.partial(advance_layer, cell, layer, self._layer_views(number, first, size))
            for first, size in blocks
        ]

    def _is_lone(self, number: int, blocks: Sequence[tuple[int, int]]) -> bool:
        if self.deterministic or blocks[0][1] != 1:
            return False
        # Reading half the bytes makes up for oneDNN's dearer calls only where there are many.
        return not self._bfloat16 or self._recurrent[number][0].plain.nbytes < _MANY_BYTES

    def _layer_views(self, number: int, first: int, num_rows: int) -> LayerViews:
        width, padded = self.width, slice(first, first + self.padded_rows(num_rows))
        rows = slice(first, first + num_rows)
        products, state = self._products[padded], self._states[:, number]  # (B', G*H'), (., S')
        return LayerViews(
            add=self._bind_recurrent(number, padded, num_rows),
            gates=products[:num_rows, : 2 * width],
            blocks=torch.split(products[:num_rows], width, dim=1),
            new_hidden=state[rows, :width],
            memory=state[rows, width:] if self.state_width > width else None,
            scratch=self._scratch[rows],
        )

    def _bind_recurrent(self, number: int, padded: slice, num_rows: int) -> tuple[Callable[[], Sequence[Tensor]], ...]:
        cell, weights = self.config.cell, self._recurrent[number]
        hidden, scratch = self._states[padded, number, : self.width], self._scratch[padded]
        sums = torch.split(self._products[padded], [weight.plain.shape[1] for weight in weights], dim=1)
        sizes = part_sizes(cell, self.width)
        first = bind_add(weights[0], hidden, sums[0], num_rows, sizes[0])
        if cell == "gru":
            return first, bind_add(weights[1], scratch, sums[1], num_rows, sizes[1])
        if cell == "gru_reset_after":
            bias = self.layers[number].recurrent_bias
            assert bias is not None
            multiply = bind_biased(weights[1], bias, hidden, scratch, num_rows)
            return first, lambda: (multiply(),)
        return (first,)
