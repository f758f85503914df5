"""`python -m bench.naive_server PORT MODEL_DIRECTORY`: a server as one writes it in an afternoon, for comparison.

A stream for each session, a thread for each stream (gRPC's synchronous server), a message for each token, and in it
one step of torch's nn.GRUCell with the embedding before and the head behind. The model is a `gru_reset_after`, which is
what nn.GRUCell computes, so that its answers can be compared with the same model's of cellserve.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
import torch
from google.protobuf.wrappers_pb2 import UInt32Value
from safetensors.torch import load_file

from bench.methods import NAIVE_FOLLOW
from bench.peers import make_torch_step

_NUM_THREADS: Final = 300


class Servicer:
    """Answers each token with the likeliest next one."""

    def __init__(self, directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        cell = make_torch_step(directory, "gru_reset_after")
        assert isinstance(cell, torch.nn.GRUCell)
        self._cell = cell
        self._embedding = tensors["embedding"]
        self._head_weight, self._head_bias = tensors["head.weight"], tensors["head.bias"]

    def follow(self, requests: Iterator[UInt32Value], _: grpc.ServicerContext) -> Iterator[UInt32Value]:
        with torch.inference_mode():
            hidden = torch.zeros(1, self._cell.hidden_size)
            for request in requests:
                hidden = self._cell(self._embedding[request.value].unsqueeze(0), hidden)
                logits = torch.nn.functional.linear(hidden, self._head_weight, self._head_bias)
                yield UInt32Value(value=int(logits.argmax()))


def serve(port: int, directory: Path) -> None:
    torch.set_num_threads(1)  # more would only wait for each other here
    server = grpc.server(ThreadPoolExecutor(_NUM_THREADS))
    handler = grpc.stream_stream_rpc_method_handler(
        Servicer(directory).follow,
        request_deserializer=UInt32Value.FromString,
        response_serializer=UInt32Value.SerializeToString,
    )
    _, service, method = NAIVE_FOLLOW.split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
