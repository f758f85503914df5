"""The options that every subcommand takes: which server, which model, which form of output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

import typer

from cellserve import ModelInfo, Tls
from cellserve.cli.problems import MisuseError

__all__ = [
    "DEFAULT_METRICS_URL",
    "DEFAULT_SERVER",
    "SERVER_HELP",
    "JsonOption",
    "MetricsUrlOption",
    "ModelOption",
    "Options",
    "ServerOption",
    "options_of",
]

DEFAULT_SERVER: Final = "localhost:50051"
DEFAULT_METRICS_URL: Final = "http://localhost:9464/metrics"

SERVER_HELP: Final = "The server; several of one store with commas between."

ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help=SERVER_HELP, show_default=DEFAULT_SERVER),
]
MetricsUrlOption = Annotated[
    str | None,
    typer.Option("--metrics-url", metavar="URL", help="Its Prometheus endpoint.", show_default=DEFAULT_METRICS_URL),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The model.", show_default="the only one served"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON instead of text.")]


@dataclass(frozen=True, slots=True)
class Options:
    """What the common options say. model: None where none was named. tls: False for a plain connection."""

    server: str = DEFAULT_SERVER
    metrics_url: str = DEFAULT_METRICS_URL
    model: str | None = None
    writes_json: bool = False
    tls: bool | Tls = False

    def choose_model(self, served: Sequence[ModelInfo]) -> ModelInfo:
        """The model to use out of those served. Raises MisuseError."""
        names = ", ".join(model.name for model in served) or "none"
        if self.model is None:
            if len(served) != 1:
                raise MisuseError(f"name a model with --model; {self.server} serves: {names}")
            return served[0]
        for model in served:
            if model.name == self.model:
                return model
        raise MisuseError(f"{self.server} serves no model {self.model!r}; it serves: {names}")


def options_of(
    context: typer.Context,
    *,
    server: str | None = None,
    metrics_url: str | None = None,
    model: str | None = None,
    writes_json: bool = False,
) -> Options:
    """The options before the subcommand, overridden by those behind it."""
    options = context.obj if isinstance(context.obj, Options) else Options()
    return replace(
        options,
        server=server or options.server,
        metrics_url=metrics_url or options.metrics_url,
        model=model or options.model,
        writes_json=writes_json or options.writes_json,
    )
