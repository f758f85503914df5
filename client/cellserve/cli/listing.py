"""`cellserve models`, `cellserve sessions` and `cellserve evict`: what a server holds, and what it shall not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cellserve import ModelInfo
from cellserve.cli.options import JsonOption, ModelOption, ServerOption, options_of
from cellserve.cli.output import make_console, make_table, write_json
from cellserve.cli.problems import sync_client

__all__ = ["evict", "models", "sessions"]


def models(context: typer.Context, server: ServerOption = None, writes_json: JsonOption = False) -> None:
    """Print the models that are served.

    JSON: a list of objects with the fields of a Model in model_service.proto; the fingerprint in hex.
    """
    options = options_of(context, server=server, writes_json=writes_json)
    with sync_client(options.server, options.tls) as client:
        served = client.models()
    if options.writes_json:
        write_json([asdict(model) | {"fingerprint": model.fingerprint.hex()} for model in served])
        return
    table = make_table("model", "version", "cell", "layers", "hidden", "takes", "gives", "parameters", "device")
    for model in served:
        table.add_row(
            model.name,
            str(model.version),
            model.cell,
            str(model.num_layers),
            str(model.hidden_size),
            _input_of(model),
            "states" if model.output_size is None else f"{model.output_size} outputs",
            f"{model.num_parameters:,}",
            model.device,
        )
    make_console().print(table)


def sessions(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Print at most so many.")] = 100,
    server: ServerOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Print the sessions that are open, by id; with --model those of one model.

    JSON: a list of objects with the fields of a Session in session_service.proto.
    """
    options = options_of(context, server=server, model=model, writes_json=writes_json)
    with sync_client(options.server, options.tls) as client:
        found = client.sessions(options.model)
    shown = found[:limit]
    if options.writes_json:
        write_json([asdict(session) for session in shown])
        return
    table = make_table("session", "model", "position", "waiting", "tier", "attached", "idle s", "age s")
    for session in shown:
        table.add_row(
            session.id,
            f"{session.model}/{session.model_version}",
            f"{session.position:,}",
            f"{session.num_pending_tokens:,}",
            session.tier,
            "yes" if session.attached else "no",
            f"{session.idle_seconds:.1f}",
            f"{session.age_seconds:.1f}",
        )
    console = make_console()
    console.print(table)
    if len(shown) < len(found):
        console.print(f"and {len(found) - len(shown):,} more; see --limit")


def evict(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Sessions, as `cellserve sessions` names them.")],
    server: ServerOption = None,
    writes_json: JsonOption = False,
) -> None:
    """End sessions, whoever holds them; who asks for one afterwards is told that it was evicted.

    JSON: an object with the last position of each. The first that cannot be ended stops the command.
    """
    options = options_of(context, server=server, writes_json=writes_json)
    positions: dict[str, int] = {}
    with sync_client(options.server, options.tls) as client:
        for session_id in ids:
            positions[session_id] = client.evict_session(session_id)
            if not options.writes_json:
                typer.echo(f"{session_id} ended at position {positions[session_id]:,}")
    if options.writes_json:
        write_json(positions)


def _input_of(model: ModelInfo) -> str:
    if model.vocab_size is not None:
        return f"{model.vocab_size:,} tokens"
    return f"vectors of {model.input_size}"
