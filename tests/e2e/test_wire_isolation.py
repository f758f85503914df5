"""Isolation: the same bits whatever shares the batch, on a deterministic server; and nobody meets another's state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.models import CELLS
from tests.support.server import ServerProcess
from tests.support.stream import RawStream, outputs
from tests.support.unseen import UNSEEN, UnseenModel
from tests.support.wire import Wire

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def server(unseen_models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log_file = tmp_path_factory.mktemp("deterministic") / "server.log"
    settings: dict[str, str | int | float | bool] = {"deterministic": True, "max_slots": 40, "max_sessions": 100}
    with ServerProcess(log_file, unseen_models_directory, settings) as process:
        yield process


@pytest.mark.parametrize("model", UNSEEN, ids=lambda model: model.name)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_are_the_same_bits_whatever_shares_the_batches(
    wire: Wire, stream: RawStream, cell: str, model: UnseenModel
) -> None:
    name = model.directory_name(cell)
    random = np.random.default_rng(4)
    tokens = model.tokens(random, NUM_TOKENS)
    expected = alone(stream, name, tokens, NUM_TOKENS)
    np.testing.assert_array_equal(alone(stream, name, tokens, 1), expected)
    np.testing.assert_array_equal(alone(stream, name, tokens, 7), expected)
    for others in (1, 2, 4, 6, 15, 39, 60):  # 60: more than there are slots
        found = in_company(stream, name, model, tokens, others, random)
        np.testing.assert_array_equal(found, expected, err_msg=f"with {others} others")


def wanted(name: str) -> Any:
    return outputs(states=True, gates="vanilla" not in name)


def alone(stream: RawStream, name: str, tokens: NDArray[Any], run_length: int) -> NDArray[np.float32]:
    """The states of a session that is by itself, in runs of one length."""
    opened = stream.open(name)
    parts = [
        stream.step(opened.handle, tokens[first : first + run_length], wanted(name)).outputs["states"]
        for first in range(0, len(tokens), run_length)
    ]
    stream.done(stream.close_session(opened.handle))
    return np.concatenate(parts)


def in_company(
    stream: RawStream,
    name: str,
    model: UnseenModel,
    tokens: NDArray[Any],
    num_others: int,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """The states of a session among others, whose runs have other lengths."""
    opened = stream.open_many(name, num_others + 1)
    handles = [one.handle for one in opened]
    mine = int(random.integers(num_others + 1))
    parts: list[NDArray[np.float32]] = []
    first = 0
    while first < len(tokens):
        end = min(len(tokens), first + int(random.integers(1, 15)))
        runs = [model.tokens(random, int(random.integers(1, 15))) for _ in opened]
        runs[mine] = tokens[first:end]
        requests = stream.run(handles, runs, wanted(name))
        answers = [stream.answer(request) for request in requests]
        parts.append(answers[mine].outputs["states"])
        first = end
    for request in stream.close_sessions(handles):
        stream.done(request)
    return np.concatenate(parts)
