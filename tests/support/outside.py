"""Oracles by other people's hands: torch.nn and ONNX Runtime run the weights of a model directory.

Symbols: T tokens, L layers, H hidden size, I input size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from safetensors.numpy import load_file
from torch import nn

__all__ = ["onnx_gru_states", "torch_states"]

Array = NDArray[np.float32]
_MODULES: dict[str, Any] = {"vanilla_rnn": nn.RNN, "gru_reset_after": nn.GRU, "lstm": nn.LSTM}


class _Files:
    """A model directory: config, tensors, and the float inputs of its tokens."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.tensors = load_file(directory / "model.safetensors")
        self.num_layers: int = self.config["num_layers"]
        self.hidden_size: int = self.config["hidden_size"]

    def inputs(self, tokens: NDArray[Any]) -> Array:
        """(T, I) from ids (T,) or vectors (T, I)."""
        embedded: Array = self.tensors["embedding"][tokens] if "embedding" in self.tensors else tokens
        return embedded

    def layer(self, number: int, name: str) -> Array:
        return self.tensors[f"layers.{number}.{name}"]

    def rows(self, array: Array, order: tuple[int, ...]) -> Array:
        """The blocks of H rows in another order."""
        return np.concatenate([array[block * self.hidden_size : (block + 1) * self.hidden_size] for block in order])


def torch_states(directory: Path, tokens: NDArray[Any]) -> Array:
    """States after every token by torch.nn's own module, layer by layer in float64: (T, L, state_size)."""
    files = _Files(directory)
    cell = files.config["cell"]
    given = torch.from_numpy(files.inputs(tokens)).double()
    order = (1, 0, 2) if cell == "gru_reset_after" else tuple(range({"vanilla_rnn": 1, "lstm": 4}[cell]))
    states = []
    for number in range(files.num_layers):
        module = _MODULES[cell](given.shape[1], files.hidden_size).double()
        bias = files.layer(number, "bias")
        recurrent_bias = np.zeros_like(bias)
        if cell == "gru_reset_after":
            recurrent_bias[2 * files.hidden_size :] = files.layer(number, "recurrent_bias")
        parameters = {
            "weight_ih_l0": files.layer(number, "input_weight"),
            "weight_hh_l0": files.layer(number, "recurrent_weight"),
            "bias_ih_l0": bias,
            "bias_hh_l0": recurrent_bias,
        }
        module.load_state_dict({name: torch.from_numpy(files.rows(array, order)) for name, array in parameters.items()})
        with torch.no_grad():
            carried, rows, outputs = None, [], []
            for token in given:
                output, carried = module(token[None], carried)
                rows.append(torch.cat(carried, dim=1) if cell == "lstm" else carried)
                outputs.append(output)
        states.append(torch.cat(rows))
        given = torch.cat(outputs)
    stacked: Array = torch.stack(states, dim=1).numpy()
    return stacked


def onnx_gru_states(directory: Path, tokens: NDArray[Any]) -> Array:
    """States after every token by ONNX Runtime's GRU with linear_before_reset=0, layer by layer: (T, L, H)."""
    files = _Files(directory)
    given, states = files.inputs(tokens).astype(np.float32), []
    for number in range(files.num_layers):
        # ONNX has the gates in the order z, r, h, as the files have; its second bias is the recurrent one.
        bias = files.layer(number, "bias")
        constants = {
            "W": files.layer(number, "input_weight")[None],
            "R": files.layer(number, "recurrent_weight")[None],
            "B": np.concatenate((bias, np.zeros_like(bias)))[None],
        }
        node = helper.make_node(
            "GRU", ["X", "W", "R", "B"], ["Y"], hidden_size=files.hidden_size, linear_before_reset=0
        )
        graph = helper.make_graph(
            [node],
            "gru",
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [len(given), 1, given.shape[1]])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [len(given), 1, 1, files.hidden_size])],
            [helper.make_tensor(name, TensorProto.FLOAT, a.shape, a.ravel()) for name, a in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
        session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        given = np.asarray(session.run(None, {"X": given[:, None]})[0]).reshape(len(given), files.hidden_size)
        states.append(given)
    return np.stack(states, axis=1)
