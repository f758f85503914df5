"""Which outputs a run asks for, and the arrays they come in.

R is the number of output rows, k the run's top_k, O the output size, L layers, S the state size, G gates, H hidden.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal, invalid
from cellserve_service.stepping import FloatArray, IntArray, ModelInfo, TokenArray, Want

MAX_TOP_K = 1024

WordArray = NDArray[np.uint32]


def predicts_tokens(model: ModelInfo) -> bool:
    """Whether the head's outputs are the logits of the next token."""
    return model.vocab_size is not None and model.output_size == model.vocab_size


class At(IntEnum):
    """At which tokens of a run outputs are wanted."""

    NONE = 1
    LAST = 2
    EVERY = 3


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What a run asks for."""

    at: At = At.NONE
    next_token: bool = False
    top_k: int = 0
    logprobs: bool = False
    head_outputs: bool = False
    states: bool = False
    gates: bool = False

    @property
    def wants(self) -> Want:
        """The bits of one token at which outputs are wanted."""
        if self.at is At.NONE:
            return Want(0)
        wants = Want(0)
        for asked, bit in (
            (self.next_token, Want.NEXT_TOKEN),
            (self.top_k > 0, Want.TOP_K),
            (self.logprobs, Want.LOGPROB),
            (self.head_outputs, Want.HEAD_OUTPUT),
            (self.states, Want.STATE),
            (self.gates, Want.GATES),
        ):
            if asked:
                wants |= bit
        return wants

    def check(self, model: ModelInfo, max_answer_bytes: int) -> Refusal | None:
        """Why the model cannot give these outputs, if it cannot."""
        if self.at is At.NONE:
            return None
        if self.top_k > MAX_TOP_K or (model.vocab_size is not None and self.top_k > model.vocab_size):
            most = min(MAX_TOP_K, model.vocab_size or MAX_TOP_K)
            return invalid(f"top_k is {self.top_k}; model {model.name} gives at most {most}", "outputs.top_k")
        lacking = None
        if self.next_token or self.top_k or self.logprobs:
            if model.vocab_size is None:
                lacking = "a vocabulary (next_token, top_k and logprobs are for token models)"
            elif not predicts_tokens(model):
                lacking = "an output head over its vocabulary"
        if self.head_outputs and model.output_size is None:
            lacking = "an output head"
        if self.gates and not model.gate_names:
            lacking = f"gates (its cell is {model.cell})"
        if lacking is not None:
            return Refusal(
                ErrorReason.ERROR_REASON_OUTPUT_UNSUPPORTED,
                f"model {model.name} lacks {lacking}",
                field="outputs",
            )
        row_bytes = 4 * OutputLayout.of(self, model).row_words
        if row_bytes > max_answer_bytes:
            return Refusal(
                ErrorReason.ERROR_REASON_OUTPUT_UNSUPPORTED,
                f"the outputs asked for take {row_bytes} bytes a token, over max_answer_bytes {max_answer_bytes}",
                field="outputs",
            )
        return None


NO_OUTPUTS = OutputSpec()


@dataclass(slots=True)  # not frozen: that takes twice as long to make, and most messages make one
class OutputArrays:
    """Outputs of R rows; None where not asked for."""

    next_tokens: TokenArray | None = None  # (R,)
    top_tokens: TokenArray | None = None  # (R, k)
    top_logprobs: FloatArray | None = None  # (R, k)
    logprobs: FloatArray | None = None  # (R,)
    head_outputs: FloatArray | None = None  # (R, O)
    states: FloatArray | None = None  # (R, L, S)
    gates: FloatArray | None = None  # (R, G, L, H)

    def select(self, rows: IntArray | slice) -> "OutputArrays":
        """The given rows of every array."""
        return OutputArrays(*(None if a is None else a[rows] for a in self._arrays()))

    @classmethod
    def concatenate(cls, parts: Sequence["OutputArrays"]) -> "OutputArrays":
        """The rows of all parts, one after the other; all parts have the same arrays."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._arrays() for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))

    @property
    def has_floats(self) -> bool:
        """Whether there is an array beside those of tokens."""
        return not (
            self.logprobs is None
            and self.top_logprobs is None
            and self.head_outputs is None
            and self.states is None
            and self.gates is None
        )

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum([array.nbytes for array in self._arrays() if array is not None])

    def _arrays(self) -> tuple[Any, ...]:
        """Every array, in the order of the fields."""
        return (
            self.next_tokens,
            self.top_tokens,
            self.top_logprobs,
            self.logprobs,
            self.head_outputs,
            self.states,
            self.gates,
        )


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """How one output row of a spec lies in memory: 4-byte words in all, and of each array its name, the words that
    are before it, its own, and the shape of its row.
    """

    row_words: int
    arrays: tuple[tuple[str, int, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, spec: OutputSpec, model: ModelInfo) -> "OutputLayout":
        shapes: list[tuple[str, tuple[int, ...]]] = []
        if spec.at is not At.NONE:
            if spec.next_token:
                shapes.append(("next_tokens", ()))
            if spec.top_k:
                shapes += [("top_tokens", (spec.top_k,)), ("top_logprobs", (spec.top_k,))]
            if spec.logprobs:
                shapes.append(("logprobs", ()))
            if spec.head_outputs:
                shapes.append(("head_outputs", (model.output_size or 0,)))
            if spec.states:
                shapes.append(("states", (model.num_layers, model.state_size)))
            if spec.gates:
                shapes.append(("gates", (len(model.gate_names), model.num_layers, model.hidden_size)))
        widths = [int(np.prod(shape, dtype=np.int64)) for _, shape in shapes]
        starts = itertools.accumulate(widths, initial=0)
        columns = zip(shapes, starts, widths, strict=False)  # there is one start more, behind all
        return cls(sum(widths), tuple((name, start, width, shape) for (name, shape), start, width in columns))

    def pack(self, outputs: OutputArrays, words: WordArray) -> None:
        """Write the rows as words. words: (R, row_words)."""
        for name, start, width, _ in self.arrays:
            words[:, start : start + width] = getattr(outputs, name).reshape(len(words), width).view(np.uint32)

    def unpack(self, words: WordArray) -> OutputArrays:
        """The arrays of rows packed before, as copies. words: (R, row_words)."""
        arrays: dict[str, Any] = {}
        for name, start, width, shape in self.arrays:
            column: NDArray[Any] = words[:, start : start + width].copy()
            if name not in ("next_tokens", "top_tokens"):
                column = column.view(np.float32)
            arrays[name] = column.reshape(len(words), *shape)
        return OutputArrays(**arrays)
