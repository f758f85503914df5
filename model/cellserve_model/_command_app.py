"""The options and output of `cellserve-model`; imported only where typer, rich and torch are installed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from cellserve_model.bundled import Progress, train
from cellserve_model.catalog import bundled_models_directory
from cellserve_model.cells import CELLS
from cellserve_model.corpus import standard_library_files
from cellserve_model.devices import choose_device
from cellserve_model.errors import ModelError
from cellserve_model.files import CARD_FILE, read_model
from cellserve_model.training import TrainingSettings

__all__ = ["app"]

app = typer.Typer(
    help="Train and inspect the models that cellserve serves.", no_args_is_help=True, add_completion=False
)
_console = Console(soft_wrap=True, highlight=False)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)
_DEFAULTS = TrainingSettings()


@app.command("train")
def train_command(
    export: Annotated[
        Path | None,
        typer.Option(help="Model directory to write: <models>/<name>/<version>; by default the bundled model's."),
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = Path(".train"),
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint where there is one.")] = True,
    cell: Annotated[str, typer.Option(help=f"One of {', '.join(CELLS)}.")] = _DEFAULTS.cell,
    num_layers: Annotated[int, typer.Option(min=1)] = _DEFAULTS.num_layers,
    hidden_size: Annotated[int, typer.Option(min=1)] = _DEFAULTS.hidden_size,
    embedding_size: Annotated[int, typer.Option(min=1)] = _DEFAULTS.embedding_size,
    num_rows: Annotated[int, typer.Option(min=1, help="Files read side by side.")] = _DEFAULTS.num_rows,
    num_steps: Annotated[int, typer.Option(min=1, help="Bytes through which a gradient flows.")] = _DEFAULTS.num_steps,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bytes to learn from.")] = _DEFAULTS.max_tokens,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its peak.")] = _DEFAULTS.peak_learning_rate,
    seed: Annotated[int, typer.Option(min=0)] = _DEFAULTS.seed,
    report_tokens: Annotated[int, typer.Option(min=1, help="Bytes between checkpoints.")] = 2_500_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.")] = None,
) -> None:
    """Train a byte model on the standard library's own source, resuming from the last checkpoint."""
    if export is None:
        export = bundled_models_directory() / "pycode" / "1"
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = train(
            TrainingSettings(
                cell=cell,
                num_layers=num_layers,
                hidden_size=hidden_size,
                embedding_size=embedding_size,
                num_rows=num_rows,
                num_steps=num_steps,
                max_tokens=max_tokens,
                peak_learning_rate=learning_rate,
                seed=seed,
            ),
            standard_library_files(),
            checkpoint_directory=checkpoints,
            export_directory=export,
            device=choose_device(device),
            resume=resume,
            report_tokens=report_tokens,
            report=_report,
        )
    except ModelError as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        _errors.print(f"interrupted; the same command goes on from the last checkpoint in {checkpoints}")
        raise typer.Exit(130) from None
    _console.print(
        f"{result.num_files} held-out files: {result.bits_per_byte:.3f} bits per byte; "
        f"xz -9e: {result.xz_bits_per_byte:.3f}; written to {export}"
    )


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(help="Model directory: <models>/<name>/<version>.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Check a model directory and show what it holds: configuration, parameters, fingerprint, card."""
    try:
        files = read_model(directory)
        card = _read_card(directory)
    except ModelError as error:
        raise _failed(error) from None
    shapes = {name: list(tensor.shape) for name, tensor in files.tensors.items()}
    num_parameters = sum(tensor.numel() for tensor in files.tensors.values())
    if as_json:
        content = {
            "config": files.config.to_json(),
            "num_parameters": num_parameters,
            "fingerprint": files.fingerprint.hex(),
            "tensors": shapes,
            "card": card,
        }
        typer.echo(json.dumps(content, indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = _flat(files.config.to_json()) | {
        "parameters": f"{num_parameters:,}",
        "fingerprint": files.fingerprint.hex(),
        **{f"tensor {name}": str(shape) for name, shape in shapes.items()},
        **({"card": f"none ({CARD_FILE} is absent)"} if card is None else _flat(card, "card ")),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    _console.print(table)


def _report(progress: Progress) -> None:
    _console.print(
        f"{progress.num_tokens / 1e6:8.1f} of {progress.max_tokens / 1e6:.1f} million bytes, "
        f"{progress.tokens_per_second:,.0f}/s: training {progress.training_bits_per_byte:.3f}, "
        f"held out {progress.score.bits_per_byte:.3f} bits per byte "
        f"(xz {progress.score.xz_bits_per_byte:.3f})"
        f"{', exported' if progress.is_best else ''}"
    )


def _read_card(directory: Path) -> dict[str, object] | None:
    path = directory / CARD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable JSON file: {error}") from None
    return content if isinstance(content, dict) else {"content": content}


def _flat(content: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Nested objects as dotted names, for a table."""
    rows: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{name}.")
        else:
            rows[prefix + name] = "none" if value is None else str(value)
    return rows


def _failed(error: ModelError) -> typer.Exit:
    _errors.print(f"cellserve-model: {error}", markup=False)
    return typer.Exit(1)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
