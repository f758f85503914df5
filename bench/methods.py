"""Names that servers and their clients share, without what either imports."""

from __future__ import annotations

from typing import Final

__all__ = ["ECHO_STREAM", "ECHO_UNARY", "NAIVE_FOLLOW", "NULL_MODEL", "STEP", "STREAM"]

ECHO_STREAM: Final = "/bench.Echo/Stream"
ECHO_UNARY: Final = "/bench.Echo/Unary"
NAIVE_FOLLOW: Final = "/bench.Naive/Follow"
STREAM: Final = "/cellserve.v1.SessionService/Stream"
STEP: Final = "/cellserve.v1.SessionService/Step"
NULL_MODEL: Final = "null"
