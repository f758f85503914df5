"""`cellserve step`: consume tokens in one session and show what the model makes of them."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from cellserve import ModelInfo, StepResult
from cellserve.cli.options import JsonOption, ModelOption, ServerOption, options_of
from cellserve.cli.output import make_console, make_table, write_json
from cellserve.cli.problems import sync_client
from cellserve.cli.tokens import Tokens, read_tokens, show_token

__all__ = ["step"]


class At(StrEnum):
    """At which tokens outputs are wanted."""

    EVERY = "every"
    LAST = "last"
    NONE = "none"


def step(
    context: typer.Context,
    tokens: Annotated[
        list[str] | None,
        typer.Argument(
            help="Token ids; for a model of vectors one vector each: 0.5,-1,2 (behind -- if it begins with -). "
            "Default: standard input."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Tokens as text, for a model of bytes.")] = None,
    session: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Attach or create this session, and keep it. Default: a passing one."),
    ] = None,
    at: Annotated[At, typer.Option(help="Show outputs after every token, the last, or none.")] = At.EVERY,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="The K likeliest next tokens.")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="How likely each token given was.")] = False,
    states: Annotated[bool, typer.Option("--states", help="The whole state; shown with --json.")] = False,
    server: ServerOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Consume tokens in one session, as one step, and show what the model makes of them.

    JSON: an object with "session", "model", "position" and, where asked for, the arrays of a StepResult: "next_token",
    "top_tokens", "top_logprobs", "logprobs", "outputs", "states"; the first axis is the token.
    """
    options = options_of(context, server=server, model=model, writes_json=writes_json)
    with sync_client(options.server, options.tls) as client:
        chosen = options.choose_model(client.models())
        column = read_tokens(chosen, tokens or [], text)
        with client.session(chosen.name, id=session) as opened:
            result = opened.step(column, at=at.value, top_k=top_k, logprobs=logprobs, states=states)
            session_id = opened.id
    if options.writes_json:
        write_json({"session": session_id, "model": chosen.name, "position": result.position} | _arrays(result))
    else:
        _print(result, column, chosen, session_id if session is not None else None, at)


def _arrays(result: StepResult) -> dict[str, object]:
    arrays = {
        "next_token": result.next_token,
        "top_tokens": result.top_tokens,
        "top_logprobs": result.top_logprobs,
        "logprobs": result.logprobs,
        "outputs": result.outputs,
        "states": result.states,
    }
    return {name: array.tolist() for name, array in arrays.items() if array is not None}


def _print(result: StepResult, tokens: Tokens, model: ModelInfo, kept_id: str | None, at: At) -> None:
    console = make_console()
    shown = {At.EVERY: list(tokens), At.LAST: [tokens[-1]], At.NONE: []}[at]
    headings = ["position", "token"]
    columns: list[list[str]] = []
    if result.logprobs is not None:
        headings.append("surprisal bits")
        columns.append([f"{-logprob / math.log(2):.2f}" for logprob in result.logprobs.tolist()])
    if result.next_token is not None:
        headings.append("next")
        columns.append([show_token(token, model) for token in result.next_token.tolist()])
    if result.top_tokens is not None and result.top_logprobs is not None:
        headings.append("likeliest next")
        columns.append(_likeliest(result.top_tokens, result.top_logprobs, model))
    if result.outputs is not None:
        headings.append("outputs")
        columns.append([_numbers(row) for row in result.outputs])
    if shown:
        table = make_table(*headings)
        first = result.position - len(shown) + 1
        for row, token in enumerate(shown):
            written = _numbers(token) if isinstance(token, np.ndarray) else show_token(int(token), model)
            table.add_row(str(first + row), written, *(column[row] for column in columns))
        console.print(table, markup=False)
    where = "a passing session" if kept_id is None else f"session {kept_id}"
    console.print(f"{where} of {model.name}, now at position {result.position:,}", markup=False)


def _likeliest(tokens: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32], model: ModelInfo) -> list[str]:
    return [
        ", ".join(
            f"{show_token(token, model)} {math.exp(logprob):.1%}"
            for token, logprob in zip(row.tolist(), row_logprobs.tolist(), strict=True)
        )
        for row, row_logprobs in zip(tokens, logprobs, strict=True)
    ]


def _numbers(row: npt.NDArray[np.float32]) -> str:
    first = ", ".join(f"{number:.4g}" for number in row[:6].tolist())
    return f"{first}{', …' if len(row) > 6 else ''}"
