"""Results: read from columns, cut out of frames, joined from slices."""

import dataclasses

import numpy as np
import pytest

from cellserve import columns as byte_columns
from cellserve._info import ModelInfo
from cellserve._outputs import At, make_output_spec
from cellserve._results import Columns, StepManyResult, StepResult, join_results
from cellserve.v1.stream_pb2 import AnswerEvent, Event, StreamResponse
from cellserve.v1.values_pb2 import FloatBlock, OutputAt, OutputColumns, OutputRequest


def model_info(*, vocab_size: int | None = 11, output_size: int | None = 11) -> ModelInfo:
    return ModelInfo(
        name="m",
        version=1,
        cell="gru",
        num_layers=2,
        hidden_size=3,
        state_size=3,
        vocab_size=vocab_size,
        input_size=None if vocab_size else 4,
        output_size=output_size,
        gate_names=("update", "reset"),
        num_parameters=1,
        fingerprint=bytes(32),
        device="cpu",
    )


def block(*shape: int) -> FloatBlock:
    return FloatBlock(shape=shape, values=np.arange(np.prod(shape), dtype="<f4").tobytes())


def request_of(
    model: ModelInfo,
    at: At = "every",
    next_token: bool | None = None,
    outputs: bool | None = None,
    top_k: int = 0,
) -> OutputRequest:
    spec = make_output_spec(model, at, next_token, top_k, False, outputs, False, False)
    return OutputRequest.FromString(spec.encoded)


def test_a_model_of_tokens_gives_the_next_token_by_default() -> None:
    assert request_of(model_info()) == OutputRequest(at=OutputAt.OUTPUT_AT_EVERY, next_token=True)


def test_a_model_of_vectors_gives_its_head_outputs_by_default() -> None:
    model = model_info(vocab_size=None, output_size=2)
    assert request_of(model, at="last") == OutputRequest(at=OutputAt.OUTPUT_AT_LAST, head_outputs=True)


def test_a_model_without_a_head_gives_nothing_by_default() -> None:
    spec = make_output_spec(model_info(output_size=None), "every", None, 0, False, None, False, False)
    assert (spec.at, spec.encoded) == ("none", b"")


def test_an_output_that_the_model_does_not_have_is_left_to_the_server_to_refuse() -> None:
    assert request_of(model_info(vocab_size=None, output_size=2), next_token=True).next_token
    assert request_of(model_info(output_size=None), outputs=True).head_outputs


def test_at_none_asks_for_nothing_whatever_else_is_wished() -> None:
    spec = make_output_spec(model_info(), "none", True, 3, True, True, True, True)
    assert spec.encoded == b""


@pytest.mark.parametrize(("at", "top_k"), [("each", 0), ("every", -1), ("every", 1.5), (None, 0)])
def test_wishes_that_make_no_sense_are_a_value_error(at: At, top_k: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        make_output_spec(model_info(), at, None, top_k, False, None, False, False)


def test_every_column_becomes_the_array_of_its_shape() -> None:
    spec = make_output_spec(model_info(), "every", None, 2, True, True, True, True)
    outputs = OutputColumns(
        next_tokens=[4, 5, 6],
        top_tokens=[1, 2, 3, 4, 5, 6],
        top_logprobs=block(3, 2),
        logprobs=block(3),
        head_outputs=block(3, 11),
        states=block(3, 2, 3),
        gates=block(3, 2, 2, 3),
    )
    frame = StreamResponse(events=[Event(answers=AnswerEvent(outputs=outputs))]).SerializeToString()
    columns = spec.read(byte_columns.StreamResponse.FromString(frame).events[0].answers.outputs)
    result = columns.result(13, 1, 3)
    assert result.position == 13
    assert result.next_token is not None
    assert result.next_token.tolist() == [5, 6]
    assert result.next_token.dtype == np.int64
    assert result.top_tokens is not None
    assert result.top_tokens.tolist() == [[3, 4], [5, 6]]
    assert result.top_logprobs is not None
    assert result.top_logprobs.tolist() == [[2, 3], [4, 5]]
    assert result.logprobs is not None
    assert result.logprobs.tolist() == [1, 2]
    assert result.outputs is not None
    assert result.outputs.shape == (2, 11)
    assert result.outputs.dtype == np.float32
    assert result.states is not None
    assert result.states.shape == (2, 2, 3)
    assert result.gates is not None
    assert list(result.gates) == ["update", "reset"]
    assert result.gates["reset"].shape == (2, 2, 3)
    assert result.gates["reset"][0, 0].tolist() == [18, 19, 20]


def test_what_was_not_asked_for_is_none() -> None:
    result = Columns({"next_token": np.array([1, 2])}).result(2, 0, 2)
    others = {field.name for field in dataclasses.fields(StepResult)} - {"position", "next_token"}
    assert all(getattr(result, name) is None for name in others)


def test_a_result_is_frozen_whichever_way_it_was_made() -> None:
    result = Columns({"next_token": np.array([1, 2])}).result(2, 0, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.position = 3  # type: ignore[misc]
    assert dataclasses.replace(result, position=3).next_token is result.next_token


def test_keeping_one_result_of_a_large_frame_does_not_keep_the_frame() -> None:
    small, large = np.zeros(16, dtype=np.float32), np.zeros((64, 1024), dtype=np.float32)
    assert Columns({"logprobs": small}).result(1, 0, 1).logprobs.base is small  # type: ignore[union-attr]
    assert Columns({"states": large}).result(1, 0, 1).states.base is None  # type: ignore[union-attr]


def test_slices_of_a_long_run_join_in_order() -> None:
    gates = {"update": np.arange(3.0, dtype=np.float32)}
    columns = Columns({"next_token": np.array([1, 2, 3])}, gates)
    joined = join_results([columns.result(4, 0, 2), columns.result(5, 2, 3)])
    assert joined.position == 5
    assert joined.next_token is not None
    assert joined.next_token.tolist() == [1, 2, 3]
    assert joined.gates is not None
    assert joined.gates["update"].tolist() == [0, 1, 2]


def test_parts_that_asked_for_nothing_add_nothing_to_the_last_one() -> None:
    last = Columns({"next_token": np.array([7])}).result(9, 0, 1)
    joined = join_results([StepResult(4), StepResult(8), last])
    assert joined.position == 9
    assert joined.next_token is not None
    assert joined.next_token.tolist() == [7]


def test_a_result_of_many_sessions_gives_the_result_of_each() -> None:
    many = StepManyResult(
        positions=np.array([3, 10, 2]),
        counts=np.array([2, 0, 1]),
        row_starts=np.array([0, 2, 2, 3]),
        next_token=np.array([4, 5, 6]),
        gates={"update": np.array([0.0, 1.0, 2.0], dtype=np.float32)},
    )
    assert len(many) == 3
    assert [result.position for result in many] == [3, 10, 2]
    assert [many[index].next_token.tolist() for index in (0, 1, -1)] == [[4, 5], [], [6]]  # type: ignore[union-attr]
    assert [result.gates["update"].tolist() for result in many] == [[0, 1], [], [2]]  # type: ignore[index]
    with pytest.raises(IndexError):
        many[3]
