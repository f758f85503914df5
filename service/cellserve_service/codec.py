"""Turns messages between the engine's process and its front-end processes into bytes and back.

A pickle of a list of messages. Arrays go as shape, type and bytes, and dataclasses as their fields in order: what
pickle does by itself with them takes three times as long. Both ends are processes of one server.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from types import UnionType
from typing import Any, get_args

import numpy as np

from cellserve_service import control, messages
from cellserve_service.errors import Refusal
from cellserve_service.outputs import OutputArrays, OutputSpec

__all__ = ["decode", "encode"]

_PROTOCOL = 5

_Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


def encode(batch: Sequence[object]) -> bytes:
    """The bytes of a batch of messages."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, _PROTOCOL)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(batch)
    return file.getvalue()


def decode(data: bytes) -> list[Any]:
    """The messages of a batch; their arrays cannot be written to."""
    batch: list[Any] = pickle.loads(data)  # noqa: S301 - from the other end of a socket pair of ours
    return batch


def _reduce_array(array: np.ndarray[Any, Any]) -> _Reduced:
    return np.ndarray, (array.shape, array.dtype.str, array.tobytes())


def _by_fields(kind: type[Any]) -> Callable[[Any], _Reduced]:
    names = [field.name for field in fields(kind)]
    if not names:
        return lambda _: (kind, ())
    if len(names) == 1:
        return lambda message: (kind, (getattr(message, names[0]),))
    values = attrgetter(*names)
    return lambda message: (kind, values(message))


def _members(*unions: UnionType) -> list[type[Any]]:
    return [kind for union in unions for kind in get_args(union)]


_REDUCERS: dict[type[Any], Callable[[Any], Any]] = {
    kind: _by_fields(kind)
    for kind in (
        *_members(messages.Command, messages.Event, control.ToWorker, control.FromWorker),
        messages.InitialState,
        messages.SessionFacts,
        messages.SessionTarget,
        OutputArrays,
        OutputSpec,
        Refusal,
    )
} | {np.ndarray: _reduce_array}
