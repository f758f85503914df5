"""Runs Triton kernels on a CPU where there is no GPU: import this before Triton and any kernels.

`DEVICE` is where the kernels run: the GPU, compiled, where torch sees one, else the CPU through Triton's
interpreter, with amendments. Its matrix product takes bfloat16 for integers, so they are widened, which is
exact. And it runs the programs of a grid one after another, with which programs that wait for each other never
end; within `concurrent_programs` each has a thread of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["DEVICE", "IS_INTERPRETED", "concurrent_programs"]

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IS_INTERPRETED = DEVICE.type == "cpu"
if IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported and when a kernel is defined

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_Builder: Any = interpreter.InterpreterBuilder
_multiply = _Builder.create_dot


def _create_dot(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
    if left.dtype.scalar == tl.bfloat16:
        left, right = (builder.cast_impl(operand, tl.float32) for operand in (left, right))
    return _multiply(builder, left, right, *rest)


_Builder.create_dot = _create_dot
_patched: set[str] = set()


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    # The launch has amended triton.language already; anew at every call, as the interpreter does, doubles the time.
    if function.fn.__module__ not in _patched:
        _patched.add(function.fn.__module__)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_device_function


class _PlaceInGrid(threading.local):
    """The interpreter's note of which program is running, one for each thread."""

    place: Any = None


@contextmanager
def concurrent_programs() -> Iterator[None]:
    """All programs of a grid run at once, a thread each; for grids of one dimension."""
    places = _PlaceInGrid()

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name in executor.arg_names}
        scope = interpreter._patch_lang(executor.fn)
        try:
            given = interpreter.inspect.getcallargs(executor.fn, *args, **kwargs)
            given = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            (num_programs,) = executor.grid
            interpreter.interpreter_builder.set_grid_dim(num_programs, 1, 1)
            errors: list[BaseException] = []

            def program(number: int) -> None:
                places.place = (number, 0, 0)
                try:
                    executor.fn(**given)
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=program, args=(number,), daemon=True) for number in range(num_programs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=300)
                assert not thread.is_alive(), "a program waits for one that does not come"
            if errors:
                raise errors[0]
        finally:
            scope.restore()

    before = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = run
    _Builder.grid_idx = property(lambda builder: places.place, lambda builder, place: None)
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = before
        del _Builder.grid_idx
