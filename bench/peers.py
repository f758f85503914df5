"""One step of the same cells by others: torch's modules and ONNX Runtime, on one thread.

Symbols: B rows, T steps, H hidden size, G row blocks, I input size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import nn

__all__ = ["ONNX_CELLS", "make_onnx_run", "make_torch_step"]

Floats = npt.NDArray[np.float32]
_TORCH_ORDER: Final = {"vanilla_rnn": [0], "gru": [1, 0, 2], "gru_reset_after": [1, 0, 2], "lstm": [0, 1, 2, 3]}
_TORCH_CELLS: Final = {
    "vanilla_rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "gru_reset_after": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
_ONNX_ORDER: Final = {"vanilla_rnn": [0], "gru": [0, 1, 2], "gru_reset_after": [0, 1, 2], "lstm": [0, 3, 1, 2]}
ONNX_CELLS: Final = tuple(_ONNX_ORDER)


def make_torch_step(directory: Path, cell: str) -> nn.RNNCellBase | None:
    """torch's cell with the weights of a model directory; None where it has none.

    For `gru` it is nn.GRUCell all the same, the nearest that torch has: its reset gate acts after the product.
    """
    if cell not in _TORCH_CELLS:
        return None
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    num_rows, input_size = tensors["input_weight"].shape
    order = _TORCH_ORDER[cell]
    hidden_size = num_rows // len(order)
    module: nn.RNNCellBase = _TORCH_CELLS[cell](input_size, hidden_size)
    recurrent_bias = np.zeros(num_rows, np.float32)
    if "recurrent_bias" in tensors:
        recurrent_bias[2 * hidden_size :] = tensors["recurrent_bias"]
    with torch.no_grad():
        module.weight_ih.copy_(torch.from_numpy(_blocks(tensors["input_weight"], order)))
        module.weight_hh.copy_(torch.from_numpy(_blocks(tensors["recurrent_weight"], order)))
        module.bias_ih.copy_(torch.from_numpy(_blocks(tensors["bias"], order)))
        module.bias_hh.copy_(torch.from_numpy(recurrent_bias))
    return module


def make_onnx_run(directory: Path, cell: str, num_steps: int, num_rows: int) -> Callable[[Floats, Floats], Floats]:
    """ONNX Runtime's operator for T steps: takes vectors (T, B, I) and the state before, returns the one after.

    States are (B, H), for `lstm` (B, 2H). Inputs and outputs stay in buffers that are bound once. Raises ImportError
    where ONNX Runtime is not installed.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    runtime: Any = onnxruntime  # without types

    tensors = {name.rpartition(".")[2]: tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    order = _ONNX_ORDER[cell]
    rows, input_size = tensors["input_weight"].shape
    hidden_size = rows // len(order)
    bias = np.concatenate([_blocks(tensors["bias"], order), np.zeros(rows, np.float32)])
    if "recurrent_bias" in tensors:
        bias[-hidden_size:] = tensors["recurrent_bias"]
    names = ["hidden", "memory"] if cell == "lstm" else ["hidden"]
    kind = {"vanilla_rnn": "RNN", "lstm": "LSTM"}.get(cell, "GRU")
    attributes: dict[str, Any] = {"hidden_size": hidden_size}
    if kind == "GRU":
        attributes["linear_before_reset"] = int(cell == "gru_reset_after")
    node = helper.make_node(
        kind, ["x", "W", "R", "B", "", *names], ["", *(f"{name}_after" for name in names)], **attributes
    )
    state_shape = [1, num_rows, hidden_size]
    graph = helper.make_graph(
        [node],
        "step",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [num_steps, num_rows, input_size])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, state_shape) for name in names],
        [helper.make_tensor_value_info(f"{name}_after", TensorProto.FLOAT, state_shape) for name in names],
        [
            numpy_helper.from_array(_blocks(tensors["input_weight"], order)[None], "W"),
            numpy_helper.from_array(_blocks(tensors["recurrent_weight"], order)[None], "R"),
            numpy_helper.from_array(bias[None], "B"),
        ],
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    vectors = np.zeros((num_steps, num_rows, input_size), np.float32)
    before = {name: np.zeros(state_shape, np.float32) for name in names}
    after = {name: np.zeros(state_shape, np.float32) for name in names}
    binding = session.io_binding()
    for name, array in {"x": vectors, **before}.items():
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    for name, array in after.items():
        binding.bind_output(f"{name}_after", "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(given: Floats, state: Floats) -> Floats:
        vectors[:] = given
        for number, name in enumerate(names):
            before[name][0] = state[:, number * hidden_size : (number + 1) * hidden_size]
        session.run_with_iobinding(binding)
        return np.concatenate([after[name][0] for name in names], axis=1)

    return run


def _blocks(rows: Floats, order: list[int]) -> Floats:
    """Blocks of rows in another order. rows: (G*H,) or (G*H, .)."""
    return np.concatenate([np.split(rows, len(order))[block] for block in order])
