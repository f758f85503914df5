"""What a step asks for, and how the answer's columns are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cellserve._info import ModelInfo
from cellserve._results import Columns
from cellserve.columns import read_column
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputRequest

__all__ = ["NO_COLUMNS", "At", "OutputSpec", "Wishes", "make_output_spec", "read_floats"]

At: TypeAlias = Literal["every", "last", "none"]

# The arguments of a step that say what it gives: at, next_token, top_k, logprobs, outputs, states, gates.
Wishes: TypeAlias = tuple[At, bool | None, int, bool, bool | None, bool, bool]

_AT: Final = {
    "every": OutputAt.OUTPUT_AT_EVERY,
    "last": OutputAt.OUTPUT_AT_LAST,
    "none": OutputAt.OUTPUT_AT_NONE,
}

NO_COLUMNS: Final = Columns({})


@dataclass(frozen=True, slots=True, eq=False)
class OutputSpec:
    """The outputs that runs of one model ask for. Runs with the same object share a command.

    row_bytes: what one token's outputs take, where the server holds the answer for a repeat.
    """

    at: At
    encoded: bytes  # a serialized OutputRequest; empty for none
    top_k: int
    gate_names: tuple[str, ...]
    takes_vectors: bool
    row_bytes: int = 0

    def answer_bytes(self, count: int) -> int:
        """What the outputs of a run of count tokens take."""
        return self.row_bytes * count if self.at == "every" else self.row_bytes

    def read(self, outputs: Any) -> Columns:
        """The columns of an answer event, `columns.OutputColumns`."""
        if not self.encoded:
            return NO_COLUMNS
        arrays: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]] = {}
        if outputs.next_tokens:
            arrays["next_token"] = _read_tokens(outputs.next_tokens)
        if outputs.top_tokens:
            arrays["top_tokens"] = _read_tokens(outputs.top_tokens).reshape(-1, self.top_k)
        if outputs.HasField("top_logprobs"):
            arrays["top_logprobs"] = read_floats(outputs.top_logprobs)
        if outputs.HasField("logprobs"):
            arrays["logprobs"] = read_floats(outputs.logprobs)
        if outputs.HasField("head_outputs"):
            arrays["outputs"] = read_floats(outputs.head_outputs)
        if outputs.HasField("states"):
            arrays["states"] = read_floats(outputs.states)
        gates = None
        if outputs.HasField("gates"):
            block = read_floats(outputs.gates)  # (R, G, L, H)
            gates = {name: block[:, index] for index, name in enumerate(self.gate_names)}
        return Columns(arrays, gates)


def make_output_spec(
    model: ModelInfo,
    at: At,
    next_token: bool | None,
    top_k: int,
    logprobs: bool,
    outputs: bool | None,
    states: bool,
    gates: bool,
) -> OutputSpec:
    """The spec of a step's arguments. next_token and outputs None: whichever the model's kind gives by
    default.

    What the model does not have is left to the server to refuse.
    """
    if at not in _AT:
        raise ValueError(f'at is "every", "last" or "none", not {at!r}')
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k is a number of tokens, 0 or more, not {top_k!r}")
    takes_vectors = model.vocab_size is None
    has_head = model.output_size is not None
    request = OutputRequest(
        at=_AT[at],
        next_token=has_head and not takes_vectors if next_token is None else bool(next_token),
        top_k=top_k,
        logprobs=bool(logprobs),
        head_outputs=has_head and takes_vectors if outputs is None else bool(outputs),
        states=bool(states),
        gates=bool(gates),
    )
    wants_nothing = at == "none" or request == OutputRequest(at=_AT[at])
    num_numbers = (
        request.next_token
        + 2 * top_k
        + request.logprobs
        + request.head_outputs * (model.output_size or 0)
        + request.states * model.num_layers * model.state_size
        + request.gates * len(model.gate_names) * model.num_layers * model.hidden_size
    )
    return OutputSpec(
        at="none" if wants_nothing else at,
        encoded=b"" if wants_nothing else request.SerializeToString(),
        top_k=top_k,
        gate_names=model.gate_names,
        takes_vectors=takes_vectors,
        row_bytes=0 if wants_nothing else 4 * num_numbers,
    )


def read_floats(block: FloatBlock) -> npt.NDArray[np.float32]:
    """A block as an array of its shape. Read-only: it is a view of the message's bytes."""
    return np.frombuffer(block.values, dtype="<f4").reshape(tuple(block.shape))


def _read_tokens(column: bytes) -> npt.NDArray[np.int64]:
    return read_column(column, "<u4").astype(np.int64)
