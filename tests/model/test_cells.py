"""The six cells against oracles from outside: torch.nn, ONNX Runtime, and a float64 transcription."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cellserve_model import CELLS, ModelConfig, Network, TokenInput, VectorInput
from cellserve_model.equations import EQUATIONS, gru
from cellserve_model.sequences import run_layer
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

TOLERANCE = 2e-6


def _vectors(num_tokens: int, batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, batch, size, generator=torch.Generator().manual_seed(seed))


def _torch_blocks(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Our row blocks in torch's order."""
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[place] for place in order])


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("cell", "module", "order"),
    [
        ("vanilla_rnn", nn.RNN, (0,)),
        ("gru_reset_after", nn.GRU, (1, 0, 2)),
        ("lstm", nn.LSTM, (0, 1, 2, 3)),
    ],
)
def test_a_sequence_equals_the_torch_module(
    tmp_path: Path, cell: str, module: type[nn.RNN | nn.GRU | nn.LSTM], order: tuple[int, ...], num_layers: int
) -> None:
    network = Network.load(write_tiny_model(tmp_path, cell, num_layers=num_layers, hidden_size=11, input_size=4))
    reference = module(4, 11, num_layers)
    hidden_bias_only_candidate = cell == "gru_reset_after"
    with torch.no_grad():
        for number, layer in enumerate(network.layers):
            for ours, theirs in (("input_weight", "weight_ih"), ("recurrent_weight", "weight_hh"), ("bias", "bias_ih")):
                weight: Tensor = getattr(layer, ours)
                getattr(reference, f"{theirs}_l{number}").copy_(_torch_blocks(weight, order))
            recurrent_bias = torch.zeros(len(order) * 11)
            if hidden_bias_only_candidate:
                assert isinstance(layer.recurrent_bias, Tensor)
                recurrent_bias[22:] = layer.recurrent_bias
            getattr(reference, f"bias_hh_l{number}").copy_(recurrent_bias)
        inputs = _vectors(40, 5, 4)
        hidden, state = network(inputs)
        expected, last = reference(inputs)
    torch.testing.assert_close(hidden, expected, atol=TOLERANCE, rtol=0)
    if cell == "lstm":
        last = torch.cat(last, dim=2)
    torch.testing.assert_close(state, last.transpose(0, 1), atol=TOLERANCE, rtol=0)


def _onnx_gru(network: Network, inputs: Tensor) -> NDArray[np.float32]:
    """Run one ONNX GRU with the weights of a one-layer `gru`; both have the blocks z, r, h. Returns (T, B, H)."""
    layer = network.layers[0]
    hidden, width = network.config.hidden_size, network.config.layer_input_size(0)

    def constant(name: str, tensor: Tensor) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(tensor.detach().numpy()[None], name)

    assert isinstance(layer.bias, Tensor)
    assert isinstance(layer.input_weight, Tensor)
    assert isinstance(layer.recurrent_weight, Tensor)
    node = onnx.helper.make_node("GRU", ["X", "W", "R", "B"], ["Y", ""], hidden_size=hidden, linear_before_reset=0)
    graph = onnx.helper.make_graph(
        [node],
        "gru",
        [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["T", "B", width])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["T", 1, "B", hidden])],
        [
            constant("W", layer.input_weight),
            constant("R", layer.recurrent_weight),
            constant("B", torch.cat((layer.bias, torch.zeros_like(layer.bias)))),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    session: Any = onnxruntime.InferenceSession(  # type: ignore[attr-defined]
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(["Y"], {"X": inputs.numpy()})  # (T, 1, B, H)
    hidden_states: NDArray[np.float32] = output[:, 0]
    return hidden_states


def test_gru_equals_onnx_runtime_with_the_reset_gate_before_the_product(tmp_path: Path) -> None:
    network = Network.load(write_tiny_model(tmp_path, "gru", hidden_size=24, input_size=6))
    inputs = _vectors(60, 3, 6)
    expected = _onnx_gru(network, inputs)
    with torch.no_grad():
        hidden, _ = network(inputs)
    np.testing.assert_allclose(hidden.numpy(), expected, atol=5e-6)


def test_the_two_grus_differ_where_the_reset_gate_acts(tmp_path: Path) -> None:
    before = Network.load(write_tiny_model(tmp_path, "gru", input_size=3))
    tensors = before.tensors() | {"layers.0.recurrent_bias": torch.zeros(8)}
    after = Network.from_tensors(ModelConfig("gru_reset_after", 1, 8, VectorInput(3)), tensors)
    inputs = _vectors(10, 2, 3)
    assert (before(inputs)[0] - after(inputs)[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_equals_the_transcription(tmp_path: Path, cell: str, num_layers: int, kind: str) -> None:
    is_tokens = kind == "tokens"
    write_tiny_model(
        tmp_path,
        cell,
        num_layers=num_layers,
        hidden_size=9,
        vocab_size=20 if is_tokens else None,
        input_size=None if is_tokens else 4,
        output_size=6,
    )
    network, oracle = Network.load(tmp_path), Oracle(tmp_path)
    random = np.random.default_rng(1)
    inputs: NDArray[np.generic] = random.integers(0, 20, (30, 2)) if is_tokens else random.standard_normal((30, 2, 4))
    given = torch.from_numpy(inputs) if is_tokens else torch.from_numpy(inputs).float()
    with torch.no_grad():
        hidden, state = network(given)
        assert network.head is not None
        logits = network.head(hidden)
    for column in range(2):
        trace = oracle.run(given[:, column].numpy())
        np.testing.assert_allclose(hidden[:, column].numpy(), trace.states[:, -1, :9], atol=TOLERANCE)
        np.testing.assert_allclose(state[column].numpy(), trace.states[-1], atol=TOLERANCE)
        np.testing.assert_allclose(logits[:, column].numpy(), trace.logits[1:], atol=4 * TOLERANCE)


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_stepping_equals_the_sequence(cell: str, num_layers: int, kind: str, has_head: bool) -> None:
    model_input = TokenInput(30, 6) if kind == "tokens" else VectorInput(5)
    network = Network(ModelConfig(cell, num_layers, 10, model_input, 7 if has_head else None), seed=3)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 30, (12, 4), generator=generator) if kind == "tokens" else _vectors(12, 4, 5)
    with torch.no_grad():
        hidden, last_state = network(inputs)
        state = network.zero_state(4)
        for step in range(12):
            state, gates = network.step(inputs[step], state)
            torch.testing.assert_close(state[:, -1, :10], hidden[step], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(state, last_state, atol=TOLERANCE, rtol=0)
    num_gates = len(CELLS[cell].gate_names)
    assert (gates is None) if num_gates == 0 else (gates is not None and gates.shape == (4, num_gates, num_layers, 10))


def _with(network: Network, **changes: Tensor) -> Network:
    tensors = network.tensors() | {f"layers.0.{name}": tensor for name, tensor in changes.items()}
    return Network.from_tensors(network.config, tensors)


def test_leaky_rnn_with_leak_zero_is_exactly_vanilla_rnn(tmp_path: Path) -> None:
    leaky = _with(Network.load(write_tiny_model(tmp_path, "leaky_rnn", input_size=3)), leak=torch.tensor(0.0))
    tensors = {name: tensor for name, tensor in leaky.tensors().items() if not name.endswith("leak")}
    vanilla = Network.from_tensors(ModelConfig("vanilla_rnn", 1, 8, VectorInput(3)), tensors)
    inputs = _vectors(20, 3, 3)
    assert torch.equal(leaky(inputs)[0], vanilla(inputs)[0])


def test_leaky_rnn_with_leak_one_keeps_its_state_exactly(tmp_path: Path) -> None:
    leaky = _with(Network.load(write_tiny_model(tmp_path, "leaky_rnn", input_size=3)), leak=torch.tensor(1.0))
    state = _vectors(3, 1, 8, seed=5)
    assert torch.equal(leaky(_vectors(20, 3, 3), state)[1], state)


def _forced(network: Network, forget_bias: float) -> Network:
    bias = network.tensors()["layers.0.bias"].clone()
    bias[: network.config.hidden_size] = forget_bias
    return _with(network, bias=bias)


def test_simplified_gru_that_forgets_everything_is_exactly_vanilla_rnn(tmp_path: Path) -> None:
    network = _forced(Network.load(write_tiny_model(tmp_path, "simplified_gru", input_size=3)), -1e4)
    candidate = {name: tensor[8:] for name, tensor in network.tensors().items()}
    vanilla = Network.from_tensors(ModelConfig("vanilla_rnn", 1, 8, VectorInput(3)), candidate)
    inputs = _vectors(20, 3, 3)
    torch.testing.assert_close(network(inputs)[0], vanilla(inputs)[0], atol=TOLERANCE, rtol=0)
    # Nothing of the old state is left: a step is the candidate to the last bit.
    layer, state = network.tensors(), _vectors(3, 1, 8)
    products = functional.linear(inputs[0], layer["layers.0.input_weight"], layer["layers.0.bias"])
    blocks = products + state[:, 0] @ layer["layers.0.recurrent_weight"].t()
    new_state, gates = network.step(inputs[0], state)
    assert torch.equal(new_state[:, 0], torch.tanh(blocks[:, 8:]))
    assert gates is not None
    assert torch.equal(gates, torch.zeros_like(gates))


def test_simplified_gru_that_keeps_everything_is_exactly_a_memory(tmp_path: Path) -> None:
    network = _forced(Network.load(write_tiny_model(tmp_path, "simplified_gru", input_size=3)), 1e4)
    state = _vectors(3, 1, 8, seed=5)
    assert torch.equal(network(_vectors(20, 3, 3), state)[1], state)


def test_an_update_gate_of_one_keeps_the_state_of_gru_exactly(tmp_path: Path) -> None:
    network = _forced(Network.load(write_tiny_model(tmp_path, "gru", input_size=3)), 1e4)
    state = _vectors(3, 1, 8, seed=5)
    assert torch.equal(network(_vectors(20, 3, 3), state)[1], state)


def test_the_backward_pass_of_gru_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    @dataclass
    class Layer:
        recurrent_weight: Tensor
        recurrent_bias: Tensor | None = None
        leak: Tensor | None = None

    layer, inputs, state = (
        Layer((random(15, 5) / 2).requires_grad_()),
        random(9, 3, 15).requires_grad_(),
        random(3, 5).requires_grad_(),
    )
    keep = (torch.rand(9, 3, 1, generator=generator) > 0.3).double()
    weights = random(9, 3, 5)
    wanted = (inputs, state, layer.recurrent_weight)
    by_hand = torch.autograd.grad((run_layer("gru", inputs, state, keep, layer) * weights).sum(), wanted)
    current, collected = state, []
    for step in range(9):
        current = gru(inputs[step], current, layer)[0] * keep[step]
        collected.append(current)
    by_autograd = torch.autograd.grad((torch.stack(collected) * weights).sum(), wanted)
    for ours, expected in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_that_ends_starts_again_from_zero(cell: str) -> None:
    network = Network(ModelConfig(cell, 2, 6, TokenInput(10, 4)), seed=1)
    tokens = torch.randint(0, 10, (8, 1), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(8, 1, 1)
    keep[4] = 0
    with torch.no_grad():
        hidden, state = network(tokens, None, keep)
        alone, alone_state = network(tokens[5:])
    assert torch.equal(hidden[4], torch.zeros_like(hidden[4]))
    torch.testing.assert_close(hidden[5:], alone, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(state, alone_state, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_learns(cell: str) -> None:
    network = Network(ModelConfig(cell, 2, 6, TokenInput(10, 4), 3), seed=1)
    tokens = torch.randint(0, 10, (7, 2), generator=torch.Generator().manual_seed(0))
    assert network.head is not None
    network.head(network(tokens)[0]).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_leak_is_learned_or_fixed_and_stays_in_its_range() -> None:
    config = ModelConfig("leaky_rnn", 1, 4, VectorInput(2))
    network = Network(config, initial_leak=0.9)
    with torch.no_grad():
        for layer in network.layers:
            assert isinstance(layer.leak, Tensor)
            layer.leak.fill_(1.3)
    network.constrain()
    assert float(network.tensors()["layers.0.leak"]) == 1.0
    fixed = Network(config, learn_leak=False, initial_leak=0.25)
    assert float(fixed.tensors()["layers.0.leak"]) == 0.25
    assert [name for name, parameter in fixed.named_parameters() if not parameter.requires_grad] == ["layers.0.leak"]


def test_initial_parameters_depend_on_their_seed_alone() -> None:
    config = ModelConfig("gru", 2, 6, TokenInput(10, 4), 3)
    torch.manual_seed(1)
    first, state = Network(config, seed=5), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert Network(config, seed=5).fingerprint() == first.fingerprint() != Network(config, seed=6).fingerprint()


def test_there_is_an_equation_for_every_cell() -> None:
    assert set(EQUATIONS) == set(CELLS)
