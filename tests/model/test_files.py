"""Model directories: what is read, what is refused and with which words, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from cellserve_model import (
    CELLS,
    ConfigError,
    ModelConfig,
    ModelError,
    ModelFileError,
    Network,
    TokenInput,
    VectorInput,
    bundled_models_directory,
    list_models,
    read_model,
    write_model,
)
from tests.support.models import write_tiny_model


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("model_input", [TokenInput(12, 3), VectorInput(4)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_saved_network_loads_as_it_was(
    tmp_path: Path, cell: str, model_input: TokenInput | VectorInput, has_head: bool
) -> None:
    network = Network(ModelConfig(cell, 2, 5, model_input, 3 if has_head else None), seed=4)
    fingerprint = network.save(tmp_path / "new" / "1")
    loaded = Network.load(tmp_path / "new" / "1")
    assert loaded.config == network.config
    assert loaded.fingerprint() == fingerprint == read_model(tmp_path / "new" / "1").fingerprint
    for name, tensor in network.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    assert sorted(path.name for path in (tmp_path / "new" / "1").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("cell", CELLS)
def test_tensors_are_named_and_shaped_as_the_design_says(tmp_path: Path, cell: str) -> None:
    write_tiny_model(tmp_path, cell, num_layers=2, vocab_size=9, output_size=4)
    assert read_model(tmp_path).tensors.keys() == load_file(tmp_path / "model.safetensors").keys()


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_config(lambda config: config.update(format=2)), "format is 2; this version of cellserve reads format 1"),
        (_config(lambda config: config.update(format=True)), "format is True"),
        (_config(lambda config: config.pop("format")), "format is missing"),
        (_config(lambda config: config.update(cell="rwkv")), "cell 'rwkv' is unknown; the cells are vanilla_rnn"),
        (_config(lambda config: config.update(cell=3)), "cell must be a string, not 3"),
        (_config(lambda config: config.update(num_layers=0)), "num_layers is 0; it must be between 1 and"),
        (_config(lambda config: config.update(num_layers=True)), "num_layers must be a whole number, not True"),
        (_config(lambda config: config.update(hidden_size="8")), "hidden_size must be a whole number, not '8'"),
        (_config(lambda config: config.update(hidden_size=8.0)), "hidden_size must be a whole number, not 8.0"),
        (_config(lambda config: config.pop("hidden_size")), "hidden_size is missing"),
        (_config(lambda config: config.update(output_size=-1)), "output_size is -1"),
        (_config(lambda config: config.update(input=[])), "input must be a JSON object, not list"),
        (_config(lambda config: config["input"].update(kind="audio")), "input.kind is 'audio'"),
        (_config(lambda config: config["input"].pop("vocab_size")), "input.vocab_size is missing"),
        (_config(lambda config: config["input"].update(vocab_size=2**40)), "input.vocab_size is 1099511627776"),
        (lambda directory: (directory / "config.json").unlink(), "config.json: no such file"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda directory: (directory / "config.json").write_bytes(b"\xff\xfe"), "config.json: not valid JSON"),
        (lambda directory: (directory / "config.json").write_text("[1]"), "the file must be a JSON object, not list"),
    ],
)
def test_a_wrong_configuration_is_refused_by_field(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9)
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_model(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def _nan(tensors: dict[str, Any]) -> None:
    tensors["head.weight"][2, 3] = np.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_config(lambda config: config.update(hidden_size=9)), "has shape"),
        (_config(lambda config: config.update(cell="leaky_rnn")), "layers.0.leak is missing"),
        (_config(lambda config: config.update(num_layers=2)), "layers.1.bias, layers.1.input_weight"),
        (_weights(lambda tensors: tensors.pop("layers.0.bias")), "layers.0.bias is missing"),
        (_weights(lambda tensors: tensors.update(extra=np.zeros(2, np.float32))), "extra is not part of"),
        (_config(lambda config: config.update(output_size=None)), "head.bias, head.weight are not part of"),
        (
            _weights(lambda tensors: tensors.update(embedding=np.zeros((9, 5), np.float64))),
            "embedding is float64; store float32",
        ),
        (
            _weights(lambda tensors: tensors.update(embedding=np.zeros((9, 5), np.int32))),
            "embedding is int32; store float32",
        ),
        (_weights(_nan), "head.weight holds values that are not finite"),
        (lambda directory: (directory / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (
            lambda directory: (directory / "model.safetensors").write_bytes(b"\x80\x04pickle"),
            "model.safetensors: not a whole safetensors file",
        ),
        (
            lambda directory: (directory / "model.safetensors").write_bytes(
                (directory / "model.safetensors").read_bytes()[:-1]
            ),
            "model.safetensors: not a whole safetensors file",
        ),
    ],
)
def test_wrong_weights_are_refused_by_tensor(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    write_tiny_model(tmp_path, "vanilla_rnn", vocab_size=9, output_size=4)
    damage(tmp_path)
    with pytest.raises(ModelFileError) as caught:
        read_model(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_leak_beyond_its_range_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "leaky_rnn", input_size=2)
    _weights(lambda tensors: tensors.update({"layers.0.leak": np.array(1.5, np.float32)}))(tmp_path)
    with pytest.raises(ModelFileError, match=r"layers\.0\.leak is 1\.5; a leak lies in \[0, 1\]"):
        read_model(tmp_path)


def test_a_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        read_model(tmp_path / "nowhere")


def test_fields_of_other_programs_are_let_pass(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9)
    expected = read_model(tmp_path)
    _config(lambda config: config.update(author="somebody"))(tmp_path)
    assert read_model(tmp_path).fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9)
    path = tmp_path / "model.safetensors"
    halves = {name: tensor.to(dtype) for name, tensor in load_torch_file(path).items()}
    save_torch_file(halves, path)
    read = read_model(tmp_path)
    for name, tensor in read.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].to(torch.float32))
    save_torch_file(read.tensors, path)
    assert read_model(tmp_path).fingerprint == read.fingerprint


def test_the_fingerprint_is_what_its_documentation_says(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "vanilla_rnn", hidden_size=2, vocab_size=3, output_size=2)
    digest = hashlib.sha256(b"cellserve model 1\n")
    digest.update(
        b'{"cell":"vanilla_rnn","hidden_size":2,"input":{"embedding_size":5,"kind":"tokens","vocab_size":3},'
        b'"num_layers":1,"output_size":2}\n'
    )
    for name, array in sorted(load_file(tmp_path / "model.safetensors").items()):
        digest.update(struct.pack("<Q", len(name)) + name.encode())
        digest.update(struct.pack("<Q", array.ndim) + b"".join(struct.pack("<Q", size) for size in array.shape))
        digest.update(array.astype("<f4").tobytes())
    assert read_model(tmp_path).fingerprint == digest.digest()


def test_the_fingerprint_does_not_depend_on_the_layout_of_the_files(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9, output_size=4)
    expected = read_model(tmp_path).fingerprint
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "model.safetensors", {"note": "other metadata"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert read_model(tmp_path).fingerprint == expected


def test_the_fingerprint_changes_with_one_bit_of_one_weight(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9)
    expected = read_model(tmp_path).fingerprint

    def flip(tensors: dict[str, Any]) -> None:
        tensors["embedding"].view(np.uint32)[0, 0] ^= 1

    _weights(flip)(tmp_path)
    assert read_model(tmp_path).fingerprint != expected


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    network = Network(ModelConfig("gru", 1, 4, VectorInput(2)))
    with pytest.raises(ModelFileError, match="head"):
        write_model(tmp_path / "out", network.config, network.tensors() | {"head.bias": torch.zeros(2)})
    assert not (tmp_path / "out").exists()


def test_models_are_listed_with_their_versions_in_order(tmp_path: Path) -> None:
    for place in ("a/1", "a/10", "a/9", "b/3", "a/draft", "a/01", "c/latest", ".hidden/1"):
        write_tiny_model(tmp_path / place, "vanilla_rnn", input_size=1)
    (tmp_path / "empty" / "1").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("not a model")
    assert list_models(tmp_path) == {"a": [1, 9, 10], "b": [3]}


def test_a_models_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="nowhere: no such directory"):
        list_models(tmp_path / "nowhere")


def test_the_bundled_model_is_there_and_sound() -> None:
    versions = list_models(bundled_models_directory())["pycode"]
    directory = bundled_models_directory() / "pycode" / str(versions[-1])
    config = read_model(directory).config
    assert (config.cell, config.hidden_size, config.vocab_size, config.output_size) == ("gru", 512, 256, 256)
    card = json.loads((directory / "card.json").read_text())
    assert card["score"]["bits_per_byte"] < card["score"]["xz_bits_per_byte"]
