"""A model's configuration: what config.json may say, and which tensors of which shapes follow from it.

Symbols: L layers, H hidden size, G row blocks of a cell, V vocabulary, E embedding, I input size, O output
size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cellserve_model.cells import CELLS, CellSpec
from cellserve_model.errors import ConfigError

__all__ = ["CONFIG_FILE", "FORMAT", "ModelConfig", "TokenInput", "VectorInput", "parse_config", "read_config"]

FORMAT: Final = 1
CONFIG_FILE: Final = "config.json"
_MAX_SIZE: Final = 2**31 - 1  # sizes are indices of 32 bits on the wire; more is a mistake in the file


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Ids in [0, vocab_size), each looked up in an embedding of embedding_size numbers."""

    vocab_size: int
    embedding_size: int


@dataclass(frozen=True, slots=True)
class VectorInput:
    """Feature vectors of input_size numbers."""

    input_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The mathematical description of a network; raises ConfigError where the parts describe none."""

    cell: str
    num_layers: int
    hidden_size: int
    input: TokenInput | VectorInput
    output_size: int | None = None

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ConfigError(f"cell {self.cell!r} is unknown; the cells are {', '.join(CELLS)}")
        _check_size("num_layers", self.num_layers)
        _check_size("hidden_size", self.hidden_size)
        if isinstance(self.input, TokenInput):
            _check_size("input.vocab_size", self.input.vocab_size)
            _check_size("input.embedding_size", self.input.embedding_size)
        else:
            _check_size("input.input_size", self.input.input_size)
        if self.output_size is not None:
            _check_size("output_size", self.output_size)

    @property
    def spec(self) -> CellSpec:
        return CELLS[self.cell]

    @property
    def state_size(self) -> int:
        """Numbers a session carries for each layer: H, for lstm 2H (h, then c)."""
        return self.spec.state_vectors * self.hidden_size

    @property
    def vocab_size(self) -> int | None:
        return self.input.vocab_size if isinstance(self.input, TokenInput) else None

    @property
    def input_size(self) -> int | None:
        return self.input.input_size if isinstance(self.input, VectorInput) else None

    def layer_input_size(self, layer: int) -> int:
        """Width of what a layer is given: E or I at the first layer, H above it."""
        if layer > 0:
            return self.hidden_size
        return self.input.embedding_size if isinstance(self.input, TokenInput) else self.input.input_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor that model.safetensors must hold, and may hold."""
        hidden, rows = self.hidden_size, self.spec.num_blocks * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(self.input, TokenInput):
            shapes["embedding"] = (self.input.vocab_size, self.input.embedding_size)
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}."
            shapes[prefix + "input_weight"] = (rows, self.layer_input_size(layer))
            shapes[prefix + "recurrent_weight"] = (rows, hidden)
            shapes[prefix + "bias"] = (rows,)
            if self.spec.has_recurrent_bias:
                shapes[prefix + "recurrent_bias"] = (hidden,)
            if self.spec.has_leak:
                shapes[prefix + "leak"] = ()
        if self.output_size is not None:
            shapes["head.weight"] = (self.output_size, hidden)
            shapes["head.bias"] = (self.output_size,)
        return shapes

    def to_json(self) -> dict[str, object]:
        """The content of config.json, in the order people read it."""
        if isinstance(self.input, TokenInput):
            described: dict[str, object] = {
                "kind": "tokens",
                "vocab_size": self.input.vocab_size,
                "embedding_size": self.input.embedding_size,
            }
        else:
            described = {"kind": "vectors", "input_size": self.input.input_size}
        return {
            "format": FORMAT,
            "cell": self.cell,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "input": described,
            "output_size": self.output_size,
        }


def parse_config(content: object) -> ModelConfig:
    """Check the decoded content of a config.json.

    Fields of other programs are let pass, so that a directory can carry its own notes. Raises ConfigError
    that names the field.
    """
    fields = _mapping(content, "the file")
    stated_format = _field(fields, "format")
    if stated_format != FORMAT or isinstance(stated_format, bool):
        raise ConfigError(f"format is {stated_format!r}; this version of cellserve reads format {FORMAT}")
    cell = _field(fields, "cell")
    if not isinstance(cell, str):
        raise ConfigError(f"cell must be a string, not {cell!r}")
    described = _mapping(_field(fields, "input"), "input")
    kind = _field(described, "kind", "input.")
    model_input: TokenInput | VectorInput
    if kind == "tokens":
        model_input = TokenInput(
            vocab_size=_size(described, "vocab_size", "input."),
            embedding_size=_size(described, "embedding_size", "input."),
        )
    elif kind == "vectors":
        model_input = VectorInput(input_size=_size(described, "input_size", "input."))
    else:
        raise ConfigError(f"input.kind is {kind!r}; it must be 'tokens' or 'vectors'")
    return ModelConfig(
        cell=cell,
        num_layers=_size(fields, "num_layers"),
        hidden_size=_size(fields, "hidden_size"),
        input=model_input,
        output_size=None if fields.get("output_size") is None else _size(fields, "output_size"),
    )


def read_config(directory: Path) -> ModelConfig:
    """Read and check `directory`/config.json. Raises ConfigError that names the file and the field."""
    path = directory / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model directory holds {CONFIG_FILE}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    try:
        return parse_config(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object, not {type(value).__name__}")
    return value


def _field(fields: Mapping[str, object], name: str, prefix: str = "") -> object:
    if name not in fields:
        raise ConfigError(f"{prefix}{name} is missing")
    return fields[name]


def _size(fields: Mapping[str, object], name: str, prefix: str = "") -> int:
    value = _field(fields, name, prefix)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{prefix}{name} must be a whole number, not {value!r}")
    return value


def _check_size(name: str, value: int) -> None:
    if not 1 <= value <= _MAX_SIZE:
        raise ConfigError(f"{name} is {value}; it must be between 1 and {_MAX_SIZE}")
