"""Trains the bundled model on the standard library's source, and writes its model directory and card.

The corpus, the score and the export of `cellserve-model train`; the command only draws what this reports.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from cellserve_model.corpus import SourceFile, corpus_digest, is_held_out
from cellserve_model.errors import TrainingError
from cellserve_model.scoring import Score, score
from cellserve_model.training import Trainer, TrainingSettings

__all__ = ["CHECKPOINT_FILE", "MIN_SCORED_BYTES", "Progress", "train"]

CHECKPOINT_FILE = "checkpoint.safetensors"
MIN_SCORED_BYTES = 2000
_SAMPLE_FILES = 48
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Progress:
    """How training stands, once for every interval of tokens. score: of a sample of the held-out files."""

    num_tokens: int
    max_tokens: int
    training_bits_per_byte: float
    tokens_per_second: float
    score: Score
    is_best: bool


def train(
    settings: TrainingSettings,
    files: Sequence[SourceFile],
    *,
    checkpoint_directory: Path,
    export_directory: Path,
    device: torch.device,
    resume: bool = True,
    report_tokens: int = 2_500_000,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Score:
    """Train to the end of the budget and return the score over the whole of every held-out file.

    After every `report_tokens` a checkpoint is written, and the weights exported when their score on a sample
    is the best so far, so that a model can be served while it is trained. Raises TrainingError.
    """
    learned = [file for file in files if not is_held_out(file.module)]
    held_out = [file for file in files if is_held_out(file.module) and file.path.stat().st_size >= MIN_SCORED_BYTES]
    if not learned or not held_out:
        raise TrainingError(
            "no source files to learn from or none held out; this Python may lack its standard library source"
        )
    contents = [file.read_bytes() for file in held_out]
    chosen = np.unique(np.linspace(0, len(contents) - 1, _SAMPLE_FILES).astype(int))
    sample = [contents[number] for number in chosen]
    trainer = Trainer(settings, [file.read_bytes() for file in learned], device=device)
    checkpoint = checkpoint_directory / CHECKPOINT_FILE
    if resume and checkpoint.is_file():
        trainer.load_checkpoint(checkpoint)
    export = _Export(export_directory, learned, held_out)
    best = float("inf")
    while not trainer.is_finished:
        goal = min(settings.max_tokens, (trainer.num_tokens // report_tokens + 1) * report_tokens)
        progress = _train_until(trainer, goal, sample, best)
        trainer.save_checkpoint(checkpoint)
        if progress.is_best:
            best = progress.score.bits_per_byte
            export.write(trainer, progress.score, is_finished=False)
        report(progress)
    final = score(trainer.network, contents)
    export.write(trainer, final, is_finished=True)
    return final


def _train_until(trainer: Trainer, num_tokens: int, sample: list[bytes], best: float) -> Progress:
    started, first_token = time.perf_counter(), trainer.num_tokens
    total, updates = torch.zeros((), device=trainer.device), 0
    while trainer.num_tokens < num_tokens:
        total += trainer.update()
        updates += 1
    loss = float(total) / updates
    if not np.isfinite(loss):
        raise TrainingError("the loss is no longer finite; start anew with --no-resume and a lower --learning-rate")
    seconds = time.perf_counter() - started
    sampled = score(trainer.network, sample, max_bytes=_SAMPLE_BYTES)
    return Progress(
        num_tokens=trainer.num_tokens,
        max_tokens=trainer.settings.max_tokens,
        training_bits_per_byte=loss / float(np.log(2)),
        tokens_per_second=(trainer.num_tokens - first_token) / seconds,
        score=sampled,
        is_best=sampled.bits_per_byte < best,
    )


@dataclass(frozen=True, slots=True)
class _Export:
    """Where the model goes, and what its card says of the text it learned."""

    directory: Path
    learned: list[SourceFile]
    held_out: list[SourceFile]

    def write(self, trainer: Trainer, result: Score, *, is_finished: bool) -> None:
        trainer.network.save(self.directory, card=self._card(trainer, result, is_finished))

    def _card(self, trainer: Trainer, result: Score, is_finished: bool) -> dict[str, object]:
        return {
            "description": "Predicts the next byte of Python source; learned from its standard library.",
            "license": "Trained on the source of the Python standard library (PSF License Version 2).",
            "finished": is_finished,
            "score": {
                **asdict(result),
                "meaning": "mean over held-out files of bits per byte from a new session's state, "
                "every file with the same weight; xz is `xz -9e` on each file alone",
            },
            "data": {
                "source": f"standard library of Python {platform.python_version()}, *.py, tests included",
                "training_files": len(self.learned),
                "training_sha256": corpus_digest(self.learned),
                "held_out_rule": "first 8 bytes of SHA-256 of the dotted module name, modulo 10, is 0",
                "held_out_files": len(self.held_out),
                "held_out_min_bytes": MIN_SCORED_BYTES,
                "held_out_sha256": corpus_digest(self.held_out),
            },
            "training": {
                **asdict(trainer.settings),
                "num_tokens": trainer.num_tokens,
                # Where the budget was changed on the way: [bytes learned by then, budget from there on].
                "budgets": trainer.budgets,
                "device": trainer.device.type,
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "safetensors": metadata.version("safetensors"),
            },
        }
