"""`cellserve generate`: sample tokens on the server, and print them as they come."""

from __future__ import annotations

import codecs
import sys
from typing import Annotated

import typer

from cellserve import Generation, ModelInfo
from cellserve.cli.options import JsonOption, ModelOption, ServerOption, options_of
from cellserve.cli.output import write_json
from cellserve.cli.problems import sync_client
from cellserve.cli.tokens import NUM_BYTE_VALUES, read_ids

__all__ = ["generate"]


def generate(
    context: typer.Context,
    prompt: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Consume this first; where tokens are no bytes, ids with spaces between."),
    ] = "",
    session: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Attach or create this session, and keep it. Default: a passing one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Sample at most so many.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Only from the K likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="P", help="Only from the likeliest that make up P.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same tokens.")] = None,
    stop: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="ID", help="End after this token; 10 is a line's end. Can be repeated."),
    ] = None,
    server: ServerOption = None,
    model: ModelOption = None,
    writes_json: JsonOption = False,
) -> None:
    """Sample tokens on the server and print them as they come: as text, or as ids where tokens are no bytes.

    JSON: an object with "session", "model", "position", "tokens", "text" (for bytes), "seed" and "finish_reason".
    """
    options = options_of(context, server=server, model=model, writes_json=writes_json)
    with sync_client(options.server, options.tls) as client:
        chosen = options.choose_model(client.models())
        with client.session(chosen.name, id=session) as opened:
            if prompt:
                is_text = chosen.vocab_size == NUM_BYTE_VALUES
                opened.step(prompt.encode() if is_text else read_ids(prompt.split()), at="none")
            generation = opened.generate(
                max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or []
            )
            tokens = list(generation) if options.writes_json else _print(generation, chosen)
            position, session_id = opened.position, opened.id
    if options.writes_json:
        document = {"session": session_id, "model": chosen.name, "position": position, "tokens": tokens}
        if chosen.vocab_size == NUM_BYTE_VALUES:
            document["text"] = bytes(tokens).decode(errors="replace")
        write_json(document | {"seed": generation.seed, "finish_reason": generation.finish_reason})


def _print(generation: Generation, model: ModelInfo) -> list[int]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = []
    for token in generation:
        tokens.append(token)
        is_byte = model.vocab_size == NUM_BYTE_VALUES
        sys.stdout.write(decoder.decode(bytes([token])) if is_byte else f"{token} ")
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    return tokens
