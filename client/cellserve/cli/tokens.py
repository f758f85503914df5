"""Reads tokens from the command line, standard input or a file, in the form that a model takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cellserve import ModelInfo
from cellserve.cli.problems import MisuseError

__all__ = ["NUM_BYTE_VALUES", "Tokens", "read_ids", "read_tokens", "require_bytes", "show_token"]

NUM_BYTE_VALUES: Final = 256
_MAX_DIGITS: Final = 10  # of 32 bits

Tokens = bytes | npt.NDArray[np.int64] | npt.NDArray[np.float32]


def require_bytes(model: ModelInfo, what: str) -> None:
    """Raises MisuseError where the model's tokens are not bytes."""
    if model.vocab_size != NUM_BYTE_VALUES:
        takes = "vectors" if model.vocab_size is None else f"{model.vocab_size:,} tokens"
        raise MisuseError(f"{what} needs a model whose tokens are the 256 bytes; {model.name} takes {takes}")


def read_tokens(model: ModelInfo, arguments: Sequence[str], text: str | None) -> Tokens:
    """Tokens of one run. Raises MisuseError.

    text: taken as UTF-8 bytes. arguments: ids, or for a model of vectors one vector each, its numbers with commas
    between. Neither: standard input, as bytes where tokens are bytes, else ids (vectors) with white space between.
    """
    if text is not None:
        if arguments:
            raise MisuseError("give tokens or --text, not both")
        require_bytes(model, "--text")
        tokens: Tokens = text.encode()
    elif not arguments and sys.stdin.isatty():
        raise MisuseError("nothing to step: give tokens, --text, or something on standard input")
    elif not arguments and model.vocab_size == NUM_BYTE_VALUES:
        tokens = sys.stdin.buffer.read()
    else:
        words = arguments or sys.stdin.read().split()
        tokens = read_ids(words) if model.vocab_size is not None else _read_vectors(words, model)
    if not len(tokens):
        raise MisuseError("nothing to step: no token was given")
    return tokens


def read_ids(words: Sequence[str]) -> npt.NDArray[np.int64]:
    """Token ids as written. Raises MisuseError."""
    for word in words:
        if not word.isdecimal() or len(word) > _MAX_DIGITS:
            raise MisuseError(f"{word!r} is no token id; ids are whole numbers from 0, with white space between")
    return np.array([int(word) for word in words], dtype=np.int64)


def show_token(token: int, model: ModelInfo) -> str:
    """A token fit to be printed: a byte as Python writes it, any other id as a number."""
    return repr(bytes([token]))[1:] if model.vocab_size == NUM_BYTE_VALUES else str(token)


def _read_vectors(words: Sequence[str], model: ModelInfo) -> npt.NDArray[np.float32]:
    assert model.input_size is not None
    vectors = np.empty((len(words), model.input_size), dtype=np.float32)
    for row, word in zip(vectors, words, strict=True):
        try:
            numbers = [float(number) for number in word.split(",")]
        except ValueError:
            raise MisuseError(f"{word!r} is no vector; write its numbers with commas between: 0.5,-1,2") from None
        if len(numbers) != model.input_size:
            raise MisuseError(f"{word!r} has {len(numbers)} numbers; a vector of {model.name} has {model.input_size}")
        row[:] = numbers
    return vectors
