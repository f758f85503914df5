"""Turns what users pass as tokens into columns as they travel; refuses at once what can never be right."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["BYTE_VALUES", "TokenColumn", "Tokens", "VectorColumn", "Vectors", "token_column", "vector_column"]

Tokens: TypeAlias = int | bytes | bytearray | memoryview | Sequence[int] | npt.NDArray[np.integer]
Vectors: TypeAlias = npt.NDArray[np.floating] | Sequence[Sequence[float]]

# One token id as 32 bits each: what a packed fixed32 column holds.
TokenColumn: TypeAlias = "array[int]"
VectorColumn: TypeAlias = npt.NDArray[np.float32]  # (n, I), contiguous, little-endian

_MAX_ID: Final = 2**32 - 1
BYTE_VALUES: Final = 256


def token_column(tokens: object, vocab_size: int) -> TokenColumn:
    """Ids as a column: one id, a sequence or array of ids, or bytes where the vocabulary is the 256 bytes.

    TypeError for what are no ids; ValueError where an id does not fit 32 bits or an array is not
    one-dimensional. Whether an id is below vocab_size is the server's to check, once for every client.
    """
    if isinstance(tokens, str):
        raise TypeError("tokens are bytes or ids, not str: call .encode() on the text")
    if isinstance(tokens, bytes | bytearray | memoryview):
        if vocab_size != BYTE_VALUES:
            raise TypeError(f"bytes are tokens of a model with 256 tokens only; this one has {vocab_size}: pass ids")
        return array("I", iter(bytes(tokens)))
    if isinstance(tokens, np.ndarray):
        return _array_column(tokens)
    if isinstance(tokens, SupportsIndex):
        tokens = (tokens,)
    if not isinstance(tokens, Sequence):
        raise TypeError(f"tokens are bytes, or a sequence or array of ids, not {type(tokens).__name__}")
    try:
        return array("I", tokens)
    except TypeError:
        raise TypeError("a token is an integer; this sequence holds something else") from None
    except OverflowError:
        raise ValueError(f"a token id is between 0 and {_MAX_ID}") from None


def vector_column(vectors: object, input_size: int) -> VectorColumn:
    """Feature vectors as a block of float32: an array of floats, or nested sequences, of shape (n,
    input_size).

    TypeError for what are no floats, ValueError for another shape. Whether every value is finite the server
    checks.
    """
    if isinstance(vectors, str | bytes | bytearray | memoryview):
        raise TypeError(f"this model takes feature vectors, floats of shape (n, {input_size}), not text or bytes")
    if not isinstance(vectors, np.ndarray):
        if not isinstance(vectors, Sequence):
            raise TypeError(f"vectors are an array of floats, not {type(vectors).__name__}")
        try:
            vectors = np.asarray(vectors, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"vectors are an array of floats of shape (n, {input_size})") from None
    if vectors.dtype.kind != "f":
        raise TypeError(f"vectors are floats; this array is of {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] != input_size:
        hint = "; for one vector pass vector[None]" if vectors.shape == (input_size,) else ""
        raise ValueError(f"vectors have shape (n, {input_size}), not {vectors.shape}{hint}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the server refuses
        # A copy always: it may have to be sent again when its owner has filled the array with the next vectors.
        return np.array(vectors, dtype="<f4", order="C")


def _array_column(tokens: npt.NDArray[np.generic]) -> TokenColumn:
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"token ids are integers; this array is of {tokens.dtype}")
    if tokens.ndim > 1:
        raise ValueError(f"token ids are one-dimensional; this array has shape {tokens.shape}")
    ids = tokens.reshape(-1).astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > _MAX_ID):
        raise ValueError(f"a token id is between 0 and {_MAX_ID}")
    column = array("I")
    column.frombytes(ids.astype(np.uint32).tobytes())
    return column
