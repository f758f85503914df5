"""`cellserve score`: how well a model predicts files, and where they surprised it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

from cellserve import AsyncClient
from cellserve.cli.options import JsonOption, ModelOption, Options, ServerOption, options_of
from cellserve.cli.output import make_console, make_table, write_json
from cellserve.cli.problems import MisuseError, async_client
from cellserve.cli.surprise import SurprisingLine, bits_of, most_surprising_lines
from cellserve.cli.tokens import require_bytes

__all__ = ["score"]

_STEP_BYTES: Final = 2048
_MAX_FILES_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class _Score:
    file: str
    num_bytes: int
    bits_per_byte: float | None  # None for an empty file
    lines: list[SurprisingLine]


def score(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Files to score.", exists=True, dir_okay=False, readable=True)],
    lines: Annotated[int, typer.Option(min=0, metavar="N", help="Print so many surprising lines of each.")] = 3,
    server: ServerOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Print bits per byte of each file, from a new session's state on, and the lines that surprised the model most.

    JSON: one object a line for each file, with "file", "num_bytes", "bits_per_byte" and "lines": "number" (from 1),
    "num_bytes", "bits" and "excerpt" of each, most surprising first.
    """
    options = options_of(context, server=server, model=model, writes_json=writes_json)
    contents = {str(file): _read(file) for file in files}
    scores = asyncio.run(_score_all(options, contents, max_lines=lines))
    if options.writes_json:
        for each in scores:
            write_json(asdict(each))
    else:
        _print(scores)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise MisuseError(f"{file} cannot be read: {error.strerror}") from None


async def _score_all(options: Options, contents: dict[str, bytes], *, max_lines: int) -> list[_Score]:
    async with async_client(options.server, options.tls) as client:
        model = options.choose_model(await client.models())
        require_bytes(model, "score")
        # On standard error, so that a redirected standard output holds results alone.
        console = Console(stderr=True)
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("scoring", total=sum(map(len, contents.values())))
            at_once = asyncio.Semaphore(_MAX_FILES_AT_ONCE)

            async def score_one(file: str, content: bytes) -> _Score:
                async with at_once:
                    return await _score_file(client, model.name, file, content, max_lines, progress, bar)

            return await asyncio.gather(*(score_one(file, content) for file, content in contents.items()))


async def _score_file(
    client: AsyncClient, model: str, file: str, content: bytes, max_lines: int, progress: Progress, bar: TaskID
) -> _Score:
    if not content:
        return _Score(file, 0, None, [])
    logprobs = []
    async with client.session(model) as session:
        for begin in range(0, len(content), _STEP_BYTES):
            part = content[begin : begin + _STEP_BYTES]
            result = await session.step(part, next_token=False, logprobs=True)
            assert result.logprobs is not None
            logprobs.append(result.logprobs)
            progress.advance(bar, len(part))
    bits = bits_of(np.concatenate(logprobs))
    return _Score(file, len(content), float(bits.mean()), most_surprising_lines(content, bits, max_lines=max_lines))


def _print(scores: Sequence[_Score]) -> None:
    console = make_console()
    table = make_table("file", "bytes", "bits per byte")
    for each in scores:
        bits = "" if each.bits_per_byte is None else f"{each.bits_per_byte:.3f}"
        table.add_row(each.file, f"{each.num_bytes:,}", bits)
    console.print(table, markup=False)
    for each in scores:
        for line in each.lines:
            console.print(
                f"{each.file}:{line.number}: {line.bits:.0f} bits: {line.excerpt}", markup=False, soft_wrap=True
            )
