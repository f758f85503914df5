"""Training: what it learns from, that it learns, that it resumes exactly, and what it leaves behind."""

from __future__ import annotations

import json
import lzma
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from cellserve_model import (
    CELLS,
    Network,
    SourceFile,
    TrainingError,
    held_out_files,
    is_held_out,
    read_model,
    standard_library_files,
)
from cellserve_model.bundled import CHECKPOINT_FILE, Progress, train
from cellserve_model.corpus import corpus_digest
from cellserve_model.scoring import network_bits_per_byte, score, xz_bits_per_byte
from cellserve_model.streams import ByteStreams
from cellserve_model.training import Trainer, TrainingSettings

CPU = torch.device("cpu")
TEXT = [b"def f(x):\n    return x\n" * 20, b"import os\nimport sys\n" * 15, b"x = 1\ny = 2\n" * 30]
TINY = TrainingSettings(
    hidden_size=16, embedding_size=8, num_rows=3, num_steps=8, max_tokens=24 * 12, warm_up_tokens=24
)


def test_held_out_files_are_chosen_by_their_names_alone() -> None:
    # Pinned: a changed rule would put files that the bundled model has learned among the held-out ones.
    held_out = ["__future__", "_py_abc", "asyncio.log", "codecs", "codeop", "concurrent.futures", "curses", "encodings"]
    learned = ["abc", "ast", "asyncio.tasks", "email.message", "json", "os", "re", "test.test_ast", "this", "typing"]
    assert [name for name in sorted(held_out + learned) if is_held_out(name)] == held_out
    assert 0.08 < np.mean([is_held_out(f"package.module_{number}") for number in range(5000)]) < 0.12


def test_the_corpus_is_the_standard_library_without_installed_packages() -> None:
    files = standard_library_files()
    modules = [file.module for file in files]
    assert modules == sorted(set(modules))
    assert {"ast", "json", "json.decoder", "os", "asyncio.tasks"} <= set(modules)
    assert not [file for file in files if {"site-packages", "dist-packages"} & set(file.path.parts)]
    held_out = held_out_files(min_bytes=2000)
    assert {file.module for file in held_out} < set(modules)
    assert all(is_held_out(file.module) and len(file.read_bytes()) >= 2000 for file in held_out)
    assert len(held_out) >= 30


def test_the_corpus_digest_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"1")
    (tmp_path / "b.py").write_bytes(b"2")
    first, second = SourceFile("a", tmp_path / "a.py"), SourceFile("b", tmp_path / "b.py")
    digests = {
        corpus_digest([first, second]),
        corpus_digest([second, first]),
        corpus_digest([SourceFile("ab", first.path), second]),
        corpus_digest([first]),
    }
    assert len(digests) == 4
    assert corpus_digest([first, second]) == corpus_digest([first, second])


def test_streams_join_whole_files_and_mark_where_each_starts() -> None:
    files = [bytes([number]) * (number + 2) for number in range(1, 30)]
    streams = ByteStreams(files, num_rows=2, num_steps=5, seed=3)
    chunks = [streams.chunk(number) for number in range(streams.chunks_per_epoch)]
    assert [chunk.starts_epoch for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    inputs = np.concatenate([chunk.inputs for chunk in chunks])
    targets = np.concatenate([chunk.targets for chunk in chunks])
    keep = np.concatenate([chunk.keep for chunk in chunks])
    assert (inputs[1:] == targets[:-1]).all()
    # Every file is one byte repeated, so a new file starts exactly where the byte changes.
    assert (keep == (inputs == targets)).all()
    again = ByteStreams(files, num_rows=2, num_steps=5, seed=3).chunk(len(chunks) + 2)
    assert (again.inputs == streams.chunk(len(chunks) + 2).inputs).all()
    assert (streams.chunk(len(chunks)).inputs != chunks[0].inputs).any()


def test_a_corpus_too_small_for_its_rows_is_refused() -> None:
    with pytest.raises(TrainingError, match="the corpus has 3 bytes; 2 rows of 5 steps need at least 12"):
        ByteStreams([b"abc", b""], num_rows=2, num_steps=5, seed=0)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_a_small_text(cell: str) -> None:
    settings = TrainingSettings(
        cell=cell,
        hidden_size=24,
        embedding_size=8,
        num_rows=4,
        num_steps=16,
        max_tokens=64 * 150,
        peak_learning_rate=1e-2,
        warm_up_tokens=640,
    )
    trainer = Trainer(settings, TEXT, device=CPU)
    losses = []
    while not trainer.is_finished:
        losses.append(float(trainer.update()))
    assert np.mean(losses[:3]) > 4
    # Below what the frequencies of the bytes alone allow: it has learned from the state.
    frequencies = np.bincount(np.frombuffer(b"".join(TEXT), dtype=np.uint8)) / len(b"".join(TEXT))
    entropy = -sum(frequency * np.log(frequency) for frequency in frequencies if frequency > 0)
    assert np.mean(losses[-10:]) < entropy - 0.5


def test_the_learning_rate_rises_then_falls_to_its_end() -> None:
    settings = TrainingSettings(max_tokens=1000, warm_up_tokens=100, peak_learning_rate=1.0, final_learning_rate=0.1)
    rates = [settings.learning_rate(number) for number in range(0, 1001, 50)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[2] == pytest.approx(1.0)
    assert rates[11] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    whole = Trainer(TINY, TEXT, device=CPU)
    for _ in range(12):
        whole.update()
    stopped = Trainer(TINY, TEXT, device=CPU)
    for _ in range(5):
        stopped.update()
    stopped.save_checkpoint(tmp_path / "checkpoint")
    resumed = Trainer(TINY, TEXT, device=CPU)
    resumed.load_checkpoint(tmp_path / "checkpoint")
    assert resumed.num_tokens == stopped.num_tokens
    for _ in range(7):
        resumed.update()
    assert resumed.network.fingerprint() == whole.network.fingerprint()
    assert stopped.network.fingerprint() != whole.network.fingerprint()


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    Trainer(TINY, TEXT, device=CPU).save_checkpoint(tmp_path / "checkpoint")
    other = TrainingSettings(
        hidden_size=16, embedding_size=8, num_rows=3, num_steps=8, max_tokens=999, warm_up_tokens=24, seed=1
    )
    with pytest.raises(TrainingError, match=r"made with other settings \(seed\); use those, or .*--no-resume"):
        Trainer(other, TEXT, device=CPU).load_checkpoint(tmp_path / "checkpoint")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"half a file")
    with pytest.raises(TrainingError, match=r"checkpoint: not a whole checkpoint .*--no-resume"):
        Trainer(TINY, TEXT, device=CPU).load_checkpoint(tmp_path / "checkpoint")


def _bits_spelled_out(network: Network, content: bytes) -> float:
    """One byte at a time, by the equations as they stand, in float64."""
    network = network.double()
    assert network.head is not None
    state, nats = network.zero_state(1), 0.0
    with torch.no_grad():
        for byte in content:
            hidden = state[:, -1, : network.config.hidden_size]
            nats -= float(torch.log_softmax(network.head(hidden), dim=1)[0, byte])
            state, _ = network.step(torch.tensor([byte]), state)
    return nats / math.log(2) / len(content)


def test_the_score_is_the_mean_of_bits_per_byte_from_a_new_session(tmp_path: Path) -> None:
    network = Network(TINY.model_config(), seed=5)
    contents = [b"print('hello')\n" * 20, b"\n", b"class A:\n    pass\n" * 3]
    bits = network_bits_per_byte(network, contents)
    xz = [8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content) for content in contents]
    whole = score(network, contents)
    assert (whole.num_files, whole.max_bytes) == (3, None)
    assert whole.bits_per_byte == pytest.approx(bits.mean())
    assert whole.xz_bits_per_byte == pytest.approx(np.mean(xz))
    np.testing.assert_allclose(bits, [_bits_spelled_out(network, content) for content in contents], rtol=1e-5)


def test_xz_is_the_xz_of_the_command_line(tmp_path: Path) -> None:
    content = Path(os.__file__).read_bytes()
    try:
        packed = subprocess.run(["xz", "-9e", "-c"], input=content, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("the program xz is not installed")
    assert xz_bits_per_byte(content) == pytest.approx(8 * len(packed) / len(content), rel=0.01)


def _files(directory: Path) -> list[SourceFile]:
    """A corpus whose names fall on both sides of the rule."""
    directory.mkdir()
    files = []
    for number in range(40):
        path = directory / f"m{number}.py"
        path.write_bytes(TEXT[number % 3] * 8)
        files.append(SourceFile(f"m{number}", path))
    assert any(is_held_out(file.module) for file in files)
    return files


def test_training_leaves_a_model_its_card_and_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    files, reports = _files(tmp_path / "corpus"), list[Progress]()

    def run(max_tokens: int) -> float:
        settings = TrainingSettings(
            hidden_size=16, embedding_size=8, num_rows=3, num_steps=8, max_tokens=max_tokens, warm_up_tokens=24
        )
        result = train(
            settings,
            files,
            checkpoint_directory=tmp_path / "state",
            export_directory=tmp_path / "pycode" / "1",
            device=CPU,
            report_tokens=480,
            report=reports.append,
        )
        return result.bits_per_byte

    first = run(960)
    second = run(1920)
    assert [report.num_tokens for report in reports] == [480, 960, 1440, 1920]
    assert second < first
    assert (tmp_path / "state" / CHECKPOINT_FILE).is_file()
    model = read_model(tmp_path / "pycode" / "1")
    assert model.config.cell == "gru"
    text = (tmp_path / "pycode" / "1" / "card.json").read_text()
    card = json.loads(text)
    held_out = [file for file in files if is_held_out(file.module)]
    assert card["finished"] is True
    assert card["score"]["num_files"] == card["data"]["held_out_files"] == len(held_out)
    assert card["score"]["max_bytes"] is None
    assert card["score"]["bits_per_byte"] == second
    assert card["training"]["num_tokens"] == 1920
    assert card["training"]["num_rows"] == 3
    assert card["training"]["budgets"] == [[0, 960], [960, 1920]]
    assert card["data"]["held_out_sha256"] == corpus_digest(held_out)
    assert set(card["versions"]) == {"python", "torch", "numpy", "safetensors"}
    assert str(tmp_path) not in text
    exported = Network.load(tmp_path / "pycode" / "1")
    assert score(exported, [file.read_bytes() for file in held_out]).bits_per_byte == pytest.approx(second, rel=1e-6)


def test_a_corpus_without_held_out_files_is_refused(tmp_path: Path) -> None:
    files = [file for file in _files(tmp_path / "corpus") if not is_held_out(file.module)]
    with pytest.raises(TrainingError, match="none held out"):
        train(TINY, files, checkpoint_directory=tmp_path, export_directory=tmp_path / "out", device=CPU)
