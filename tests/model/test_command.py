"""The command `cellserve-model`, as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cellserve_model import read_model
from tests.support.models import write_tiny_model


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from cellserve_model._command import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
    )


def test_inspect_shows_what_a_model_directory_holds(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "lstm", num_layers=2, vocab_size=9, output_size=4)
    (tmp_path / "card.json").write_text(json.dumps({"data": {"source": "a book"}}))
    shown = _run("inspect", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    fingerprint = read_model(tmp_path).fingerprint.hex()
    for line in (r"cell +lstm", r"parameters +1,073", rf"fingerprint +{fingerprint}", r"card data\.source +a book"):
        assert re.search(line, shown.stdout), shown.stdout
    content = json.loads(_run("inspect", str(tmp_path), "--json").stdout)
    assert content["config"] == json.loads((tmp_path / "config.json").read_text())
    assert content["fingerprint"] == fingerprint
    assert content["num_parameters"] == 1073
    assert content["tensors"]["layers.1.recurrent_weight"] == [32, 8]
    assert content["card"] == {"data": {"source": "a book"}}


@pytest.mark.parametrize("damage", ["config.json", "card.json"])
def test_inspect_refuses_a_damaged_directory_in_one_line(tmp_path: Path, damage: str) -> None:
    write_tiny_model(tmp_path, "gru", vocab_size=9)
    (tmp_path / damage).write_text("{")
    refused = _run("inspect", str(tmp_path))
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith(f"cellserve-model: {tmp_path / damage}: not")
    assert len(refused.stderr.splitlines()) == 1


def test_train_refuses_what_it_cannot_do_in_one_line(tmp_path: Path) -> None:
    for option, value, words in (("--cell", "rwkv", "cell 'rwkv' is unknown"), ("--device", "tpu", "device 'tpu'")):
        refused = _run("train", "--export", str(tmp_path / "1"), "--checkpoints", str(tmp_path), option, value)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"cellserve-model: {words}")
        assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "1").exists()


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    # Stands in for an installation without the extra: these packages cannot be imported.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['typer'] = None\n")
    refused = _run("inspect", ".", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    assert refused.returncode == 2
    assert refused.stderr == "cellserve-model needs typer, which is not installed: pip install 'cellserve[server]'\n"


def test_reading_the_corpus_and_listing_models_need_no_torch() -> None:
    code = (
        "import sys, cellserve_model as m; m.standard_library_files(); m.list_models(m.bundled_models_directory());"
        "m.ModelConfig; m.StepResult; print('torch' in sys.modules, 'safetensors' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False False\n"


def test_every_public_name_is_there() -> None:
    code = "import cellserve_model as m; print([n for n in m.__all__ if not hasattr(m, n) or n not in dir(m)])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
