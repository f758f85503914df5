"""Writes results to standard output, as tables or JSON, and problems as one line to standard error."""

from __future__ import annotations

import json
import sys
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["make_console", "make_table", "write_json", "write_problem"]

# Where nobody looks at a screen of some width, nothing is cut off.
_UNBOUNDED_WIDTH: Final = 10_000


def make_console() -> Console:
    """A console on the present standard output."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED_WIDTH
    return console


def make_table(*columns: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def write_json(document: object) -> None:
    """One JSON document on a line of its own."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write_problem(line: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(f"[red]cellserve:[/] {escape(line)}")
