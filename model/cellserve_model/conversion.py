"""Turns a user's own torch.nn network into one that is served.

Symbols: L layers, H hidden size, I input size, V vocabulary, E embedding, O output size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellserve_model.config import ModelConfig, TokenInput, VectorInput
from cellserve_model.errors import ConversionError
from cellserve_model.network import Network

__all__ = ["from_torch"]

_CELL_BY_MODE = {"RNN_TANH": "vanilla_rnn", "GRU": "gru_reset_after", "LSTM": "lstm"}
# Which of torch's row blocks stands at each place of ours: torch has r, z, n for a GRU and i, f, g, o for an
# LSTM.
_BLOCK_ORDER = {"vanilla_rnn": (0,), "gru_reset_after": (1, 0, 2), "lstm": (0, 1, 2, 3)}


def from_torch(
    rnn: nn.RNN | nn.GRU | nn.LSTM, *, embedding: nn.Embedding | None = None, head: nn.Linear | None = None
) -> Network:
    """Copy a trained network: `from_torch(rnn=..., embedding=..., head=...).save(directory)`.

    rnn: any number of layers; its dropout does not act in evaluation and is left out. embedding: (V, E) for a
    model of tokens; without it the model is given vectors of `rnn.input_size` numbers. head: (O, H) on the
    top layer's h. An absent bias becomes zeros. The result computes what the modules compute in `eval()`,
    with `batch_first` of no account. Raises ConversionError for what no cell here does: bidirectional,
    proj_size, a relu RNN, float64.
    """
    cell = _cell(rnn)
    model_input: TokenInput | VectorInput = VectorInput(rnn.input_size)
    if embedding is not None:
        _check_embedding(embedding, rnn)
        model_input = TokenInput(vocab_size=embedding.num_embeddings, embedding_size=embedding.embedding_dim)
    if head is not None:
        _check_head(head, rnn)
    config = ModelConfig(
        cell=cell,
        num_layers=rnn.num_layers,
        hidden_size=rnn.hidden_size,
        input=model_input,
        output_size=None if head is None else head.out_features,
    )
    tensors: dict[str, Tensor] = {}
    if embedding is not None:
        tensors["embedding"] = embedding.weight
    for layer in range(rnn.num_layers):
        tensors |= _layer_tensors(rnn, cell, layer)
    if head is not None:
        tensors["head.weight"] = head.weight
        tensors["head.bias"] = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
    return Network.from_tensors(config, {name: _float32(name, tensor) for name, tensor in tensors.items()})


def _cell(rnn: nn.Module) -> str:
    if not isinstance(rnn, nn.RNN | nn.GRU | nn.LSTM):
        raise ConversionError(f"rnn is a {type(rnn).__name__}; it must be a torch.nn.RNN, GRU or LSTM")
    if rnn.bidirectional:
        raise ConversionError(
            "rnn is bidirectional: its backward half needs the end of the sequence, which a live stream "
            "does not have; train it with bidirectional=False"
        )
    if rnn.proj_size > 0:
        raise ConversionError(f"rnn has proj_size={rnn.proj_size}; projected states are not supported, use proj_size=0")
    if rnn.mode not in _CELL_BY_MODE:
        raise ConversionError("rnn has nonlinearity='relu'; vanilla_rnn computes tanh, train it with that")
    return _CELL_BY_MODE[rnn.mode]


def _check_embedding(embedding: nn.Module, rnn: nn.RNNBase) -> None:
    if not isinstance(embedding, nn.Embedding):
        raise ConversionError(f"embedding is a {type(embedding).__name__}; it must be a torch.nn.Embedding")
    if embedding.max_norm is not None:
        raise ConversionError("embedding has max_norm, which changes rows as they are read; renormalise it beforehand")
    if embedding.embedding_dim != rnn.input_size:
        raise ConversionError(
            f"embedding gives {embedding.embedding_dim} numbers, but rnn.input_size is {rnn.input_size}"
        )


def _check_head(head: nn.Module, rnn: nn.RNNBase) -> None:
    if not isinstance(head, nn.Linear):
        raise ConversionError(f"head is a {type(head).__name__}; it must be a torch.nn.Linear")
    if head.in_features != rnn.hidden_size:
        raise ConversionError(f"head takes {head.in_features} numbers, but rnn.hidden_size is {rnn.hidden_size}")


def _layer_tensors(rnn: nn.RNNBase, cell: str, layer: int) -> dict[str, Tensor]:
    hidden = rnn.hidden_size

    def blocks(name: str) -> list[Tensor]:
        weight: Tensor = getattr(rnn, f"{name}_l{layer}")
        parts = torch.split(weight.detach(), hidden)
        return [parts[place] for place in _BLOCK_ORDER[cell]]

    input_blocks, recurrent_blocks = blocks("weight_ih"), blocks("weight_hh")
    zeros = [input_blocks[0].new_zeros(hidden)] * len(input_blocks)
    input_bias = blocks("bias_ih") if rnn.bias else zeros
    recurrent_bias = blocks("bias_hh") if rnn.bias else zeros
    prefix = f"layers.{layer}."
    tensors = {
        prefix + "input_weight": torch.cat(input_blocks),
        prefix + "recurrent_weight": torch.cat(recurrent_blocks),
    }
    if cell == "gru_reset_after":
        # The reset gate multiplies the candidate's own recurrent bias, so that one cannot be folded.
        tensors[prefix + "recurrent_bias"] = recurrent_bias[2]
        recurrent_bias = [*recurrent_bias[:2], zeros[2]]
    tensors[prefix + "bias"] = torch.cat(input_bias) + torch.cat(recurrent_bias)
    return tensors


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        stated = str(tensor.dtype).removeprefix("torch.")
        raise ConversionError(f"{name} is {stated}; models are float32, call .float() on the modules first")
    return tensor.detach().cpu().to(torch.float32)
