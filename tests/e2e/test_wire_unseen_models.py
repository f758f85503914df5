"""Model directories that the project has not seen: every cell is served, and its states are an outside oracle's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cellserve.v1.model_service_pb2 import ListModelsRequest
from tests.support.comparing import assert_outputs, until
from tests.support.models import CELLS
from tests.support.outside import onnx_gru_states, torch_states
from tests.support.server import ServerProcess
from tests.support.stream import outputs
from tests.support.unseen import UNSEEN, UnseenModel
from tests.support.wire import Wire, state_values

MODELS = [pytest.param(cell, model, id=f"{model.name}-{cell}") for cell in CELLS for model in UNSEEN]
TORCH_CELLS = ("vanilla_rnn", "gru_reset_after", "lstm")


@pytest.fixture(scope="module")
def server(unseen_models_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log_file = tmp_path_factory.mktemp("unseen") / "server.log"
    with ServerProcess(log_file, unseen_models_directory, {"max_sessions": 64}) as process:
        yield process


def wanted_of(cell: str, model: UnseenModel) -> dict[str, Any]:
    """Everything that the model can give."""
    wanted: dict[str, Any] = {"states": True}
    if cell != "vanilla_rnn":
        wanted["gates"] = True
    if model.output_size is not None:
        wanted["head_outputs"] = True
        if model.vocab_size is not None:
            wanted |= {"next_token": True, "top_k": min(3, model.vocab_size), "logprobs": True}
    return wanted


@pytest.mark.parametrize(("cell", "model"), MODELS)
def test_sessions_in_mixed_batches_follow_the_transcription(wire: Wire, cell: str, model: UnseenModel) -> None:
    name = model.directory_name(cell)
    random = np.random.default_rng(len(name))
    wanted = wanted_of(cell, model)
    stream = wire.stream()
    opened = stream.open_many(name, 5)
    sequences: list[list[Any]] = [[] for _ in opened]
    sent = []
    for _ in range(4):
        runs = [model.tokens(random, int(random.choice([1, 1, 2, 7, 30]))) for _ in opened]
        positions = [len(sequence) for sequence in sequences]
        for sequence, run in zip(sequences, runs, strict=True):
            sequence += list(run)
        handles = [one.handle for one in opened]
        at = str(random.choice(["every", "last"]))
        sent.append((at, runs, positions, stream.run(handles, runs, outputs(at, **wanted), positions=positions)))
    for row, sequence in enumerate(sequences):
        trace = wire.oracle(name, model.version).run(np.array(sequence))
        for at, runs, positions, requests in sent:
            answer = stream.answer(requests[row])
            end = positions[row] + len(runs[row])
            assert answer.position == end
            tokens = [int(token) for token in sequence[:end]] if model.vocab_size is not None else None
            rows = len(runs[row]) if at == "every" else 1
            assert_outputs(answer.outputs, wanted, until(trace, end), tokens, rows)
        state = wire.state(opened[row].session_id)
        np.testing.assert_allclose(state_values(state), trace.states[-1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("cell", "model"), [param for param in MODELS if param.values[0] in TORCH_CELLS])
def test_states_are_those_of_torch(wire: Wire, cell: str, model: UnseenModel) -> None:
    name = model.directory_name(cell)
    tokens = model.tokens(np.random.default_rng(1), 60)
    assert wire.server.models is not None
    expected = torch_states(wire.server.models / name / str(model.version), tokens)
    np.testing.assert_allclose(served_states(wire, name, tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", UNSEEN, ids=lambda model: model.name)
def test_states_of_gru_are_those_of_onnx_runtime(wire: Wire, model: UnseenModel) -> None:
    name = model.directory_name("gru")
    tokens = model.tokens(np.random.default_rng(2), 60)
    assert wire.server.models is not None
    expected = onnx_gru_states(wire.server.models / name / str(model.version), tokens)
    np.testing.assert_allclose(served_states(wire, name, tokens), expected, rtol=0, atol=2e-5)


def served_states(wire: Wire, name: str, tokens: NDArray[Any]) -> NDArray[np.float32]:
    """The states after every token, by runs of several lengths: (T, L, state_size)."""
    stream = wire.stream()
    handle = stream.open(name).handle
    parts = [tokens[:1], tokens[1:3], tokens[3:50], tokens[50:]]
    return np.concatenate([stream.step(handle, part, outputs(states=True)).outputs["states"] for part in parts])


def test_every_model_is_told_as_its_files_say(wire: Wire) -> None:
    told = {model.name: model for model in wire.models.ListModels(ListModelsRequest()).models}
    assert list(told) == sorted(told)
    assert len(told) == len(MODELS)
    assert len({model.fingerprint for model in told.values()}) == len(told)
    for cell in CELLS:
        for model in UNSEEN:
            found = told[model.directory_name(cell)]
            sizes = (found.version, found.cell, found.num_layers, found.hidden_size)
            assert sizes == (model.version, cell, model.num_layers, model.hidden_size)
            assert found.state_size == model.hidden_size * (2 if cell == "lstm" else 1)
            assert len(found.fingerprint) == 32
            assert found.device == "cpu"
            assert found.HasField("output_size") == (model.output_size is not None)
            if model.vocab_size is None:
                assert found.vectors.input_size == model.input_size
            else:
                assert found.tokens.vocab_size == model.vocab_size
