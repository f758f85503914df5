"""Reads and writes model directories: config.json and model.safetensors, checked whole before use."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cellserve_model.config import CONFIG_FILE, FORMAT, ModelConfig, read_config
from cellserve_model.errors import ModelFileError

__all__ = [
    "CARD_FILE",
    "WEIGHTS_FILE",
    "ModelFiles",
    "fingerprint",
    "read_model",
    "replace_file",
    "write_model",
]

WEIGHTS_FILE: Final = "model.safetensors"
CARD_FILE: Final = "card.json"
# Both are exactly representable in float32, so the served model is the stored one to the last bit.
_WIDENED_DTYPES: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A checked model: every tensor float32, contiguous, finite and of the shape its config asks for."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    fingerprint: bytes  # 32 bytes


def read_model(directory: Path) -> ModelFiles:
    """Read a model directory.

    Tensors must be float32; float16 and bfloat16 are widened, which is exact; float64 is refused, because
    rounding it would serve another model than the one stored. Raises ConfigError or ModelFileError naming
    file and tensor.
    """
    if not directory.is_dir():
        raise ModelFileError(f"{directory}: no such directory; it should hold {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as opened:
            # Names and shapes are compared before any weight is read: a wrong file can be very large.
            stated_shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            _check_shapes(path, config, stated_shapes)
            tensors = {name: opened.get_tensor(name) for name in sorted(stated_shapes)}
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; weights are stored beside {CONFIG_FILE}") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error
    checked = {name: _check_values(path, name, tensor) for name, tensor in tensors.items()}
    return ModelFiles(config=config, tensors=checked, fingerprint=fingerprint(config, checked))


def write_model(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    card: Mapping[str, object] | None = None,
) -> bytes:
    """Write a model directory and return its fingerprint; each file appears whole or not at all.

    The weights are replaced before the configuration. Raises ModelFileError where the tensors do not fit
    `config`.
    """
    weights_path = directory / WEIGHTS_FILE
    _check_shapes(weights_path, config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    checked = {name: _check_values(weights_path, name, tensors[name].detach().cpu()) for name in sorted(tensors)}
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(weights_path, safetensors.torch.save(checked, metadata={"format": "pt"}))
    replace_file(directory / CONFIG_FILE, _json_bytes(config.to_json()))
    if card is not None:
        replace_file(directory / CARD_FILE, _json_bytes(card))
    return fingerprint(config, checked)


def fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """The 32 bytes that tell whether two models compute the same: SHA-256 over what follows, in this order.

    The ASCII text "cellserve model 1" and a newline; the configuration (cell, hidden_size, input, num_layers,
    output_size) as JSON with sorted keys, no spaces and a newline; then for each tensor, by name: the name in
    UTF-8 preceded by its length, the number of dimensions, each dimension (all as unsigned 64-bit
    little-endian) and the float32 values, little-endian, row after row. How the files are laid out or named
    does not enter.
    """
    mathematical = {name: value for name, value in config.to_json().items() if name != "format"}
    digest = hashlib.sha256(f"cellserve model {FORMAT}\n".encode())
    digest.update(json.dumps(mathematical, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy().astype("<f4", copy=False)
        encoded = name.encode()
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
        digest.update(struct.pack(f"<{1 + array.ndim}Q", array.ndim, *array.shape))
        digest.update(array.tobytes())
    return digest.digest()


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_shapes(path: Path, config: ModelConfig, stated_shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted_shapes = config.tensor_shapes()
    missing = sorted(wanted_shapes.keys() - stated_shapes.keys())
    if missing:
        raise ModelFileError(f"{path}: {_names(missing)} missing; a {config.cell} of this configuration needs them")
    extra = sorted(stated_shapes.keys() - wanted_shapes.keys())
    if extra:
        raise ModelFileError(f"{path}: {_names(extra)} not part of a {config.cell} of this configuration; remove them")
    for name, wanted in wanted_shapes.items():
        if stated_shapes[name] != wanted:
            raise ModelFileError(
                f"{path}: tensor {name} has shape {list(stated_shapes[name])}; {CONFIG_FILE} asks for {list(wanted)}"
            )


def _check_values(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype in _WIDENED_DTYPES:
        tensor = tensor.to(torch.float32)
    if tensor.dtype != torch.float32:
        stated = str(tensor.dtype).removeprefix("torch.")
        raise ModelFileError(f"{path}: tensor {name} is {stated}; store float32 (float16 and bfloat16 are read too)")
    if not bool(torch.isfinite(tensor).all()):
        raise ModelFileError(f"{path}: tensor {name} holds values that are not finite; the model is damaged")
    if name.endswith(".leak") and not 0 <= float(tensor) <= 1:
        raise ModelFileError(f"{path}: tensor {name} is {float(tensor)}; a leak lies in [0, 1]")
    return tensor.contiguous()


def _names(names: list[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "") + (" is" if len(names) == 1 else " are")


def _json_bytes(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
