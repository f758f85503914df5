"""The command line of `cellserve`: its subcommands, the options before them, and its exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from cellserve import Tls
from cellserve.cli import bench, generate, listing, score, step, top
from cellserve.cli.options import (
    DEFAULT_METRICS_URL,
    DEFAULT_SERVER,
    SERVER_HELP,
    JsonOption,
    ModelOption,
    Options,
)
from cellserve.cli.output import write_problem
from cellserve.cli.problems import CommandError, MisuseError

__all__ = ["app", "run"]

_INTERRUPTED: Final = 130

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
app.command("models")(listing.models)
app.command("sessions")(listing.sessions)
app.command("evict")(listing.evict)
app.command("step")(step.step)
app.command("score")(score.score)
app.command("generate")(generate.generate)
app.command("top")(top.top)
app.command("bench")(bench.bench)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="CELLSERVE_SERVER", metavar="HOST:PORT", help=SERVER_HELP)
    ] = DEFAULT_SERVER,
    metrics_url: Annotated[
        str,
        typer.Option(envvar="CELLSERVE_METRICS_URL", metavar="URL", help="Its Prometheus endpoint."),
    ] = DEFAULT_METRICS_URL,
    model: ModelOption = None,
    writes_json: JsonOption = False,
    uses_tls: Annotated[bool, typer.Option("--tls", envvar="CELLSERVE_TLS", help="Connect by TLS.")] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="CELLSERVE_TLS_CA", metavar="FILE", help="PEM of the authority to trust; the system's if none."
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(envvar="CELLSERVE_TLS_CERTIFICATE", metavar="FILE", help="PEM of this client's certificate."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="CELLSERVE_TLS_KEY", metavar="FILE", help="PEM of its private key.")
    ] = None,
) -> None:
    """Look at a cellserve server and use it. The options below may stand before the subcommand; those that are not of
    TLS also behind it.

    Exit codes: 0 done, 1 the server refused or does not answer, 2 misuse. With --json each subcommand writes what its
    own help says, and errors stay one line on standard error.
    """
    tls: bool | Tls = uses_tls
    if tls_ca is not None or tls_certificate is not None or tls_key is not None:
        _check_files(tls_ca, tls_certificate, tls_key)
        tls = Tls(tls_ca, tls_key, tls_certificate)
    context.obj = Options(server, metrics_url, model, writes_json, tls)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _check_files(ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    """Raises MisuseError."""
    if (certificate is None) != (key is None):
        raise MisuseError("--tls-certificate and --tls-key go together")
    for file in (ca, certificate, key):
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            raise MisuseError(f"{file} cannot be read: {error.strerror}") from None


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. arguments: by default the process's own."""
    try:
        code = app(arguments, prog_name="cellserve", standalone_mode=False)
    except CommandError as problem:
        write_problem(str(problem))
        return problem.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        # What typer raises for wrong arguments has no public class in every version that is allowed.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "cellserve")
        message = " ".join(error.format_message().split())
        write_problem(f"{message.rstrip('.')}; see {command} --help")
        return MisuseError.exit_code
    return code or 0
