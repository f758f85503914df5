"""Reads the settings, sets up the logs, and runs the server."""

import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import TextIO, cast

import structlog

from cellserve_service.server import LoadSteppers, Server, StartError
from cellserve_service.settings import Settings, read_settings


def run(arguments: Sequence[str]) -> int:
    """Serve with the settings of a command line; returns the exit status."""
    settings = read_settings(arguments)
    _set_up_logs(settings)
    try:
        return asyncio.run(Server(settings, LoadSteppers()).run())
    except StartError as error:
        print(f"cellserve-server: {error}", file=sys.stderr)  # noqa: T201 - it is what the command says
        return 2


class _LogFile(io.TextIOBase):
    """Standard error. What it cannot take is lost: a full disk that logs go to must not end the server."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def _set_up_logs(settings: Settings) -> None:
    level = getattr(logging, settings.log_level.upper())
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _LogFile())),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
