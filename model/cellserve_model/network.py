"""A whole network as a torch module, the form that trains: input, stacked cells, output head.

Symbols: B batch, T time, L layers, H hidden size, G row blocks, V vocabulary, E embedding, I input, O output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cellserve_model.config import ModelConfig, TokenInput
from cellserve_model.equations import EQUATIONS, LayerWeights
from cellserve_model.files import fingerprint, read_model, write_model
from cellserve_model.sequences import run_layer

__all__ = ["Network"]

_INITIAL_LEAK = 0.5
_KEEPING_BLOCKS = frozenset({"update", "forget"})


class _Layer(nn.Module):
    """The parameters of one layer, named and shaped as in the model file."""

    recurrent_bias: Tensor | None
    leak: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, spec = config.hidden_size, config.spec
        rows = spec.num_blocks * hidden
        self.input_weight = nn.Parameter(torch.empty(rows, config.layer_input_size(layer)))
        self.recurrent_weight = nn.Parameter(torch.empty(rows, hidden))
        self.bias = nn.Parameter(torch.empty(rows))
        self.recurrent_bias = nn.Parameter(torch.empty(hidden)) if spec.has_recurrent_bias else None
        self.leak = nn.Parameter(torch.empty(())) if spec.has_leak else None


class Network(nn.Module):
    """A recurrent network of any of the six cells; its parameters carry the names of the model file.

    config: what to build. seed: of the random initialisation, which does not touch torch's global generator;
    None leaves the parameters as they come. learn_leak: whether a `leaky_rnn` learns its leak or keeps
    `initial_leak`.
    """

    embedding: Tensor | None
    head: nn.Linear | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        learn_leak: bool = True,
        initial_leak: float = _INITIAL_LEAK,
    ) -> None:
        super().__init__()
        self.config = config
        is_tokens = isinstance(config.input, TokenInput)
        shapes = config.tensor_shapes()
        self.embedding = nn.Parameter(torch.empty(shapes["embedding"])) if is_tokens else None
        self.layers = nn.ModuleList(_Layer(config, layer) for layer in range(config.num_layers))
        self.head = None
        if config.output_size is not None:
            self.head = nn.utils.skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, config.hidden_size, config.output_size
            )
        if seed is not None:
            self._initialise(seed, initial_leak)
        for layer in self.layers:
            if layer.leak is not None:
                layer.leak.requires_grad_(learn_leak)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Network:
        """Build a network with given parameters, by file name; every one is copied."""
        network = cls(config, seed=None)
        network.load_state_dict(dict(tensors))
        return network

    @classmethod
    def load(cls, directory: Path) -> Network:
        """Read a model directory. Raises ConfigError and ModelFileError."""
        files = read_model(directory)
        return cls.from_tensors(files.config, files.tensors)

    def save(self, directory: str | Path, *, card: Mapping[str, object] | None = None) -> bytes:
        """Write a model directory and return the fingerprint (32 bytes). Raises ModelFileError."""
        return write_model(Path(directory), self.config, self.tensors(), card=card)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their names in the model file, not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def fingerprint(self) -> bytes:
        return fingerprint(self.config, self.tensors())

    def zero_state(self, batch_size: int) -> Tensor:
        """The state of sessions at position 0: (B, L, state_size) zeros on the network's device."""
        like = self.layers[0].recurrent_weight
        return cast(Tensor, like).new_zeros(batch_size, self.config.num_layers, self.config.state_size)

    def forward(self, inputs: Tensor, state: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Advance many sequences by many tokens.

        inputs: (T, B) ids, or (T, B, I) float32. state: (B, L, state_size), by default position 0. keep: (T,
        B, 1), 1, or 0 where the sequence ends with that token: its state is then zero, as a new session's.
        Returns the top layer's h after each token, (T, B, H), zero where a sequence ended, and the last
        state.
        """
        if state is None:
            state = self.zero_state(inputs.shape[1])
        last_states = []
        values = inputs
        for index, layer in enumerate(self.layers):
            products = self._input_products(index, values)  # (T, B, G*H)
            states = run_layer(self.config.cell, products, state[:, index], keep, cast(LayerWeights, layer))
            last_states.append(states[-1])
            # Where `keep` is 0 the layer above is given zero too; whatever it makes of it is then forgotten
            # as well.
            values = states[..., : self.config.hidden_size]  # (T, B, H)
        return values, torch.stack(last_states, dim=1)

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Advance each sequence by one token, by the equations as they stand.

        inputs: (B,) ids, or (B, I) float32. state: (B, L, state_size). Returns the new state and the gates
        (B, num_gates, L, H), or None where the cell has none.
        """
        advance = EQUATIONS[self.config.cell]
        states, gates, values = [], [], inputs
        for index, layer in enumerate(self.layers):
            products = self._input_products(index, values)
            layer_state, layer_gates = advance(products, state[:, index], cast(LayerWeights, layer))
            states.append(layer_state)
            if layer_gates is not None:
                gates.append(layer_gates)
            values = layer_state[:, : self.config.hidden_size]
        return torch.stack(states, dim=1), torch.stack(gates, dim=2) if gates else None

    def constrain(self) -> None:
        """Move every leak back into [0, 1]; call it after each step of an optimiser."""
        for layer in self.layers:
            if isinstance(layer.leak, Tensor):
                layer.leak.data.clamp_(0, 1)

    def _input_products(self, index: int, values: Tensor) -> Tensor:
        layer = self.layers[index]
        weight, bias = cast(Tensor, layer.input_weight), cast(Tensor, layer.bias)
        if index > 0 or self.embedding is None:
            return functional.linear(values, weight, bias)
        if self.embedding.shape[0] > values.numel():
            return functional.linear(functional.embedding(values, self.embedding), weight, bias)
        # Fewer ids than looked-up tokens: one product for each id, not for each token.
        return functional.embedding(values, functional.linear(self.embedding, weight, bias))

    def _initialise(self, seed: int, initial_leak: float) -> None:
        """Glorot uniform for what is given, orthogonal for what recurs; gates that keep start half open."""
        generator = torch.Generator().manual_seed(seed)
        hidden = self.config.hidden_size
        with torch.no_grad():
            if self.embedding is not None:
                self.embedding.normal_(0, 1, generator=generator)
            for layer in self.layers:
                bound = (6 / (hidden + cast(Tensor, layer.input_weight).shape[1])) ** 0.5
                cast(Tensor, layer.input_weight).uniform_(-bound, bound, generator=generator)
                for block in torch.split(cast(Tensor, layer.recurrent_weight), hidden):
                    nn.init.orthogonal_(block, generator=generator)
                cast(Tensor, layer.bias).zero_()
                for block_name, block in zip(
                    self.config.spec.blocks, torch.split(cast(Tensor, layer.bias), hidden), strict=True
                ):
                    if block_name in _KEEPING_BLOCKS:
                        block.fill_(1.0)
                if isinstance(layer.recurrent_bias, Tensor):
                    layer.recurrent_bias.zero_()
                if isinstance(layer.leak, Tensor):
                    layer.leak.fill_(initial_leak)
            if self.head is not None:
                bound = (6 / (hidden + self.head.out_features)) ** 0.5
                self.head.weight.uniform_(-bound, bound, generator=generator)
                self.head.bias.zero_()
