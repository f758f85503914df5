"""`python -m bench.null_server`: cellserve-server with models that compute nothing, to measure all the rest of it.

Each token t is answered with t ^ 1, so that a benchmark can check whose answer it has. The state stays as it is.
Symbols: B rows of a tick, N tokens, L layers, H hidden size, O output size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import uvloop
from numpy.typing import NDArray

from bench.methods import NULL_MODEL
from cellserve_service.server import LoadSteppers, Server
from cellserve_service.settings import Settings, read_settings
from cellserve_service.stepping import FloatArray, IntArray, Stepper, TokenArray, Want

__all__ = ["NullStepper"]

_VOCAB_SIZE: Final = 256
_HIDDEN_SIZE: Final = 128
_MAX_BATCH: Final = 16384
_EFFICIENT_BATCH: Final = 128  # as on a CPU
_NO_TOKENS: Final = np.empty((0, 0), np.uint32)
_NO_FLOATS: Final = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class _Info:
    """What a client is told of the model."""

    name: str = NULL_MODEL
    version: int = 1
    fingerprint: bytes = bytes(32)
    cell: str = "vanilla_rnn"
    num_layers: int = 1
    hidden_size: int = _HIDDEN_SIZE
    state_size: int = _HIDDEN_SIZE
    vocab_size: int | None = _VOCAB_SIZE
    input_size: int | None = None
    output_size: int | None = _VOCAB_SIZE
    gate_names: tuple[str, ...] = ()
    num_parameters: int = 0
    device: str = "none"


@dataclass(frozen=True, slots=True)
class _Result:
    """The answers of a tick; all but the next tokens are empty."""

    next_tokens: TokenArray
    top_tokens: TokenArray
    top_logprobs: FloatArray
    logprobs: FloatArray
    logits: FloatArray
    states: FloatArray
    gates: FloatArray
    num_padding_rows: int = 0
    compute_seconds: float = 0.0


class NullStepper:
    """A Stepper that returns at once."""

    def __init__(self, num_slots: int) -> None:
        self.info = _Info()
        self.num_slots = num_slots
        self.max_batch = _MAX_BATCH
        self.efficient_batch = _EFFICIENT_BATCH

    def submit(
        self,
        slots: IntArray,
        counts: IntArray,
        tokens: TokenArray | FloatArray,
        wants: NDArray[np.uint8],
        top_k: int,
    ) -> Any:
        if (wants & ~np.uint8(Want.NEXT_TOKEN)).any():
            raise NotImplementedError("the null model gives next tokens alone")
        ids = tokens.astype(np.uint32, copy=False)
        asked = ids if wants.all() else ids[wants != 0]
        return _Result(
            next_tokens=asked ^ np.uint32(1),
            top_tokens=_NO_TOKENS,
            top_logprobs=_NO_FLOATS[:, None],
            logprobs=_NO_FLOATS,
            logits=_NO_FLOATS[:, None],
            states=_NO_FLOATS[:, None, None],
            gates=_NO_FLOATS[:, None, None, None],
        )

    def submit_generate(self, *_: object) -> Any:
        raise NotImplementedError("the null model does not generate")

    def collect(self, ticket: Any) -> Any:
        return ticket

    def read_rows(self, slots: IntArray) -> FloatArray:
        return np.zeros((len(slots), 1, _HIDDEN_SIZE), np.float32)

    def write_rows(self, slots: IntArray, rows: FloatArray) -> None:
        pass

    def zero_rows(self, slots: IntArray) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class LoadNullStepper(LoadSteppers):
    """In the place of the models on disk."""

    def __call__(self, settings: Settings) -> Sequence[Stepper]:
        return [NullStepper(min(settings.max_slots, settings.max_sessions))]


if __name__ == "__main__":
    raise SystemExit(uvloop.run(Server(read_settings(sys.argv[1:]), LoadNullStepper()).run()))
