"""The main job: files followed side by side, a completion, a state carried over a restart, and the server's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve import AsyncClient
from cellserve.cli.metrics import Snapshot, read_metrics
from cellserve.cli.surprise import most_surprising_lines
from demo.files import Excerpt, choose_excerpts
from demo.following import Followed, follow_all
from demo.server_process import ServerProcess

__all__ = ["DemoError", "run_demo"]

_MODEL: Final = "pycode"
_PROMPT: Final = b"import os\nimport sys\n\n\ndef main():\n"
_COMPLETION_BYTES: Final = 200
_NUM_NEXT_BYTES: Final = 64


class DemoError(Exception):
    """Something was not as it must be; says what."""


@dataclass(frozen=True, slots=True)
class _Moved:
    """A state that leaves its server, and the bytes with which its session went on there."""

    excerpt: Excerpt
    state: bytes
    next_bytes: bytes


async def run_demo(console: Console, directory: Path, *, num_files: int, max_bytes: int) -> None:
    """Do everything and print it as it comes. directory: for the servers' logs. Raises DemoError."""
    excerpts = choose_excerpts(num_files, max_bytes)
    if len(excerpts) < num_files:
        console.print(f"The standard library here has {len(excerpts)} files that the model never saw.")
    if not excerpts:
        raise DemoError("without a file that the model never saw there is nothing to follow")
    with ServerProcess(directory / "first.log") as server:
        console.print(
            f"Server {server.target}, model {_MODEL}: {len(excerpts)} sessions, each stepped one byte at a time."
        )
        async with AsyncClient(server.target) as client:
            before = read_metrics(server.metrics_url)
            followed = await follow_all(client, _MODEL, excerpts, console)
            after = read_metrics(server.metrics_url)
            _print_followed(console, followed)
            await _print_completion(console, client)
            moved = await _export(client, excerpts[0])
    with ServerProcess(directory / "second.log") as server:
        async with AsyncClient(server.target) as client:
            await _import(client, moved)
    console.print(
        f"\n[bold]A state across a restart[/]: exported after {len(moved.excerpt.content):,} bytes of "
        f"{moved.excerpt.module} ({len(moved.state):,} bytes), imported by a new server process: the same "
        f"{len(moved.next_bytes)} next bytes."
    )
    _print_figures(console, before, after, num_bytes=sum(len(excerpt.content) for excerpt in excerpts))


def _print_followed(console: Console, followed: Sequence[Followed]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("file", no_wrap=True, max_width=40)
    for heading in ("bytes", "bits per byte", "line"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("the most surprising line", no_wrap=True, overflow="ellipsis")
    for each in followed:
        content = each.excerpt.content
        line = most_surprising_lines(content, each.bits, max_lines=1)[0]
        table.add_row(
            each.excerpt.module,
            f"{len(content):,}",
            f"{each.bits_per_byte:.2f}",
            str(line.number),
            escape(line.excerpt),
        )
    console.print()
    console.print(table)
    mean = np.mean([each.bits_per_byte for each in followed])
    console.print(f"mean over the files: {mean:.2f} bits per byte")


async def _print_completion(console: Console, client: AsyncClient) -> None:
    async with client.session(_MODEL) as session:
        await session.step(_PROMPT, at="none")
        sampled = session.generate(max_tokens=_COMPLETION_BYTES, temperature=0.5, seed=7)
        completion = bytes([byte async for byte in sampled])
    console.print("\n[bold]A completion[/], temperature 0.5, seed 7:")
    console.print(_PROMPT.decode(), style="dim", end="", markup=False)
    console.print(completion.decode(errors="replace"), markup=False)


async def _export(client: AsyncClient, excerpt: Excerpt) -> _Moved:
    async with client.session(_MODEL) as session:
        await session.step(excerpt.content, at="none")
        state = await session.export_state()
        next_bytes = bytes([byte async for byte in session.generate(_NUM_NEXT_BYTES, temperature=0.0)])
    return _Moved(excerpt, state, next_bytes)


async def _import(client: AsyncClient, moved: _Moved) -> None:
    async with client.session(_MODEL, state=moved.state) as session:
        if session.position != len(moved.excerpt.content):
            raise DemoError(f"the imported session stands at {session.position}, not at {len(moved.excerpt.content)}")
        next_bytes = bytes([byte async for byte in session.generate(_NUM_NEXT_BYTES, temperature=0.0)])
    if next_bytes != moved.next_bytes:
        raise DemoError(f"after the restart the next bytes are {next_bytes!r}, before {moved.next_bytes!r}")


def _print_figures(console: Console, before: Snapshot, after: Snapshot, *, num_bytes: int) -> None:
    """What the server's Prometheus endpoint says of the time while the files were followed."""
    num_steps = after.total("cellserve_steps_total") - before.total("cellserve_steps_total")
    if num_steps != num_bytes:
        raise DemoError(f"{num_bytes:,} bytes were sent, but the server's metrics count {num_steps:,.0f} steps")
    name = "cellserve_step_duration_seconds"
    durations = after.histogram(name).since(before.histogram(name))
    p50, p99 = durations.quantile(0.5), durations.quantile(0.99)
    if p50 is None or p99 is None:
        raise DemoError(f"the server's metrics hold no {name}")
    seconds = after.at_seconds - before.at_seconds
    console.print(
        f"\n[bold]The server's own metrics[/]: {num_steps / seconds:,.0f} tokens/s over {seconds:.1f} s; "
        f"step latency p50 {1e3 * p50:.2f} ms, p99 {1e3 * p99:.2f} ms."
    )
