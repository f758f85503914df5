"""The client of cellserve: `Client` and `AsyncClient` step recurrent models whose state stays on the server.

Names are loaded on first use, so that `import cellserve` alone costs nothing and imports no gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellserve._blocking import Client, Generation, Session
    from cellserve._client import AsyncClient
    from cellserve._generation import AsyncGeneration
    from cellserve._info import ModelInfo, SessionInfo
    from cellserve._results import StepManyResult, StepResult
    from cellserve._session import AsyncSession
    from cellserve._transport import Tls
    from cellserve.errors import CellserveError

_MODULE_BY_NAME = {
    "AsyncClient": "_client",
    "AsyncGeneration": "_generation",
    "AsyncSession": "_session",
    "CellserveError": "errors",
    "Client": "_blocking",
    "Generation": "_blocking",
    "ModelInfo": "_info",
    "Session": "_blocking",
    "SessionInfo": "_info",
    "StepManyResult": "_results",
    "StepResult": "_results",
    "Tls": "_transport",
}

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "AsyncSession",
    "CellserveError",
    "Client",
    "Generation",
    "ModelInfo",
    "Session",
    "SessionInfo",
    "StepManyResult",
    "StepResult",
    "Tls",
]


def __getattr__(name: str) -> object:
    module = _MODULE_BY_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
