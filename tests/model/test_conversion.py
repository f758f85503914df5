"""Users' own torch.nn networks: served as they compute, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cellserve_model import ConversionError, Network, Want, from_torch
from tests.model.loading import LoadStepper

AnyRnn = nn.RNN | nn.GRU | nn.LSTM


def _modules(rnn: AnyRnn) -> tuple[AnyRnn, nn.Embedding, nn.Linear]:
    return rnn.eval(), nn.Embedding(17, rnn.input_size, padding_idx=0), nn.Linear(rnn.hidden_size, 17)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("module", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_converted_network_is_served_as_the_modules_compute(
    tmp_path: Path, load: LoadStepper, module: type[nn.RNN | nn.GRU | nn.LSTM], num_layers: int, bias: bool
) -> None:
    torch.manual_seed(0)
    rnn, embedding, head = _modules(
        module(6, 9, num_layers, bias=bias, batch_first=True, dropout=0.3 if num_layers > 1 else 0.0)
    )
    from_torch(rnn=rnn, embedding=embedding, head=head).save(tmp_path)
    tokens = torch.randint(0, 17, (3, 20))
    with torch.no_grad():
        expected = head(rnn(embedding(tokens))[0])  # (3, 20, 17)
    stepper = load(tmp_path)
    counts = np.full(3, 20, dtype=np.int64)
    result = stepper.collect(
        stepper.submit(
            np.array([4, 2, 9]), counts, tokens.numpy().astype(np.uint32).ravel(), np.full(60, Want.LOGITS, np.uint8), 0
        )
    )
    np.testing.assert_allclose(result.logits.reshape(3, 20, 17), expected.numpy(), atol=3e-6)


def test_without_embedding_and_head_it_is_a_vector_model_without_outputs(tmp_path: Path) -> None:
    rnn = nn.GRU(3, 4)
    network = from_torch(rnn)
    network.save(tmp_path)
    loaded = Network.load(tmp_path)
    assert (loaded.config.input_size, loaded.config.output_size) == (3, None)
    inputs = torch.randn(12, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs)[0], rnn(inputs)[0], atol=1e-6, rtol=0)


def test_a_head_without_bias_and_half_precision_are_converted() -> None:
    network = from_torch(nn.RNN(3, 4).to(torch.bfloat16), head=nn.Linear(4, 2, bias=False).to(torch.bfloat16))
    assert torch.equal(network.tensors()["head.bias"], torch.zeros(2))
    assert {tensor.dtype for tensor in network.tensors().values()} == {torch.float32}


def test_the_modules_are_copied_not_shared() -> None:
    rnn = nn.RNN(3, 4)
    network = from_torch(rnn)
    before = network.tensors()["layers.0.input_weight"].clone()
    with torch.no_grad():
        next(rnn.parameters()).zero_()
    assert torch.equal(network.tensors()["layers.0.input_weight"], before)


@pytest.mark.parametrize(
    ("rnn", "embedding", "head", "words"),
    [
        (nn.GRU(3, 4, bidirectional=True), None, None, "bidirectional"),
        (nn.LSTM(3, 4, proj_size=2), None, None, "proj_size=2"),
        (nn.RNN(3, 4, nonlinearity="relu"), None, None, "relu"),
        (nn.GRUCell(3, 4), None, None, "rnn is a GRUCell"),
        (nn.GRU(3, 4).double(), None, None, r"float64; models are float32, call \.float\(\)"),
        (nn.GRU(3, 4), nn.Embedding(9, 5), None, r"embedding gives 5 numbers, but rnn\.input_size is 3"),
        (nn.GRU(3, 4), nn.Embedding(9, 3, max_norm=1.0), None, "max_norm"),
        (nn.GRU(3, 4), nn.Linear(9, 3), None, "embedding is a Linear"),
        (nn.GRU(3, 4), None, nn.Linear(5, 2), r"head takes 5 numbers, but rnn\.hidden_size is 4"),
        (nn.GRU(3, 4), None, nn.Sequential(nn.Linear(4, 2)), "head is a Sequential"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    rnn: nn.GRU, embedding: nn.Embedding | None, head: nn.Linear | None, words: str
) -> None:
    with pytest.raises(ConversionError, match=words):
        from_torch(rnn, embedding=embedding, head=head)
