"""What users may pass as tokens, what travels of it, and what is refused before it does."""

from dataclasses import replace

import numpy as np
import pytest

from cellserve._info import ModelInfo, ServerLimits
from cellserve._ledger import Ledger
from cellserve._model import ServedModel
from cellserve._outputs import OutputSpec
from cellserve._tokens import token_column, vector_column

LIMITS = ServerLimits(
    max_run_tokens=4096,
    max_session_pending_tokens=8192,
    max_message_bytes=65536,
    max_open_sessions=100,
    max_held_answers=4,
    max_held_answer_bytes=2048,
)
MAX_KEPT_TOKENS = 65536


def model_info(vocab_size: int | None = 256, input_size: int | None = None) -> ModelInfo:
    return ModelInfo(
        name="m",
        version=1,
        cell="gru",
        num_layers=1,
        hidden_size=8,
        state_size=8,
        vocab_size=vocab_size,
        input_size=input_size,
        output_size=vocab_size or 2,
        gate_names=("update", "reset"),
        num_parameters=1,
        fingerprint=bytes(32),
        device="cpu",
    )


@pytest.mark.parametrize(
    "tokens",
    [
        b"\x01\x02\xff",
        bytearray(b"\x01\x02\xff"),
        memoryview(b"\x01\x02\xff"),
        [1, 2, 255],
        (1, 2, 255),
        np.array([1, 2, 255], dtype=np.uint8),
        np.array([1, 2, 255], dtype=np.int64),
        np.array([1, 0, 2, 0, 255], dtype=np.uint16)[::2],
        [np.int64(1), np.uint8(2), 255],
    ],
)
def test_bytes_sequences_and_arrays_of_ids_are_the_same_column(tokens: object) -> None:
    column = token_column(tokens, 256)
    assert column.typecode == "I"
    assert column.itemsize == 4
    assert column.tolist() == [1, 2, 255]


@pytest.mark.parametrize("token", [7, np.int64(7), np.uint8(7), np.array(7)])
def test_a_single_id_is_a_column_of_one(token: object) -> None:
    assert token_column(token, 11).tolist() == [7]


def test_ranges_and_ids_of_the_largest_vocabulary_fit() -> None:
    assert token_column(range(3), 11).tolist() == [0, 1, 2]
    assert token_column([2**32 - 1], 2**32).tolist() == [2**32 - 1]


def test_no_tokens_at_all_are_left_to_the_server_to_refuse() -> None:
    assert len(token_column([], 11)) == 0
    assert len(token_column(b"", 256)) == 0


def test_a_token_out_of_the_vocabulary_is_left_to_the_server_to_refuse() -> None:
    assert token_column([11], 11).tolist() == [11]


def test_str_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"\.encode\(\)"):
        token_column("import", 256)


def test_bytes_are_refused_by_a_model_of_another_vocabulary() -> None:
    with pytest.raises(TypeError, match="256 tokens only; this one has 11"):
        token_column(b"abc", 11)


@pytest.mark.parametrize(
    "tokens", [1.5, [1.0], [1, None], ["a"], {1, 2}, None, np.array([1.0]), np.array([True]), [[1, 2]]]
)
def test_what_are_no_ids_is_a_type_error(tokens: object) -> None:
    with pytest.raises(TypeError):
        token_column(tokens, 256)


@pytest.mark.parametrize(
    "tokens", [-1, [-1], [2**32], np.array([-1]), np.array([2**32]), np.array([[1, 2]]), np.array([2**64 - 1])]
)
def test_what_no_column_can_hold_is_a_value_error(tokens: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        token_column(tokens, 256)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_vectors_of_every_float_type_travel_as_little_endian_float32(dtype: object) -> None:
    vectors = np.array([[1.0, 0.5, -2.0], [0.25, 0.0, 3.0]], dtype=dtype)  # type: ignore[call-overload]
    column = vector_column(vectors, 3)
    assert column.dtype == np.dtype("<f4")
    assert column.flags.c_contiguous
    assert column.tolist() == vectors.tolist()


def test_nested_sequences_are_vectors() -> None:
    assert vector_column([[1, 2.5]], 2).tolist() == [[1.0, 2.5]]


def test_a_transposed_array_is_sent_row_by_row() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2).T
    assert np.frombuffer(vector_column(vectors, 3).tobytes(), "<f4").tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("vectors", [b"abc", "abc", np.array([[1, 2]]), np.array([[1j, 2]]), [["a", "b"]], None])
def test_what_are_no_floats_is_a_type_error(vectors: object) -> None:
    with pytest.raises(TypeError):
        vector_column(vectors, 2)


@pytest.mark.parametrize("shape", [(3,), (1, 2), (1, 1, 3), ()])
def test_vectors_of_another_shape_are_a_value_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(n, 3\)"):
        vector_column(np.zeros(shape), 3)


def test_one_vector_alone_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"vector\[None\]"):
        vector_column(np.zeros(3), 3)


def test_a_value_too_large_for_float32_is_left_to_the_server_to_refuse() -> None:
    assert np.isinf(vector_column(np.array([[1e300]]), 1)).all()


def test_a_model_reads_a_single_id_and_a_single_byte_as_the_number_itself() -> None:
    model = ServedModel(model_info(), LIMITS, MAX_KEPT_TOKENS)
    assert model.read_tokens(97) == 97
    assert model.read_tokens(b"a") == 97
    assert list(model.read_tokens(b"ab")) == [97, 98]  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ServedModel(model_info(vocab_size=11), LIMITS, MAX_KEPT_TOKENS).read_tokens(b"a")
    with pytest.raises(ValueError, match="between"):
        model.read_tokens(-1)


def every(model: ServedModel, top_k: int = 0) -> OutputSpec:
    return model.output_spec(("every", None, top_k, False, None, False, False))


def test_a_run_is_bounded_by_the_tightest_of_the_servers_limits() -> None:
    model = ServedModel(model_info(), LIMITS, MAX_KEPT_TOKENS)
    assert model.max_run_tokens(model.no_outputs) == 4096
    vectors = ServedModel(model_info(vocab_size=None, input_size=100), LIMITS, MAX_KEPT_TOKENS)
    assert 100 < vectors.max_run_tokens(vectors.no_outputs) * 400 <= 65536
    pending = replace(LIMITS, max_session_pending_tokens=50)
    assert ServedModel(model_info(), pending, MAX_KEPT_TOKENS).max_run_tokens(model.no_outputs) == 50
    assert ServedModel(model_info(), LIMITS, 30).max_run_tokens(model.no_outputs) == 30


def test_a_run_is_no_longer_than_the_answer_that_the_server_holds() -> None:
    model = ServedModel(model_info(), LIMITS, MAX_KEPT_TOKENS)
    assert (every(model).row_bytes, model.max_run_tokens(every(model))) == (4, 512)
    assert (every(model, 15).row_bytes, model.max_run_tokens(every(model, 15))) == (124, 16)
    last = model.output_spec(("last", None, 15, False, None, False, False))
    assert model.max_run_tokens(last) == 4096


def test_no_more_runs_follow_each_other_than_the_server_holds_answers_of() -> None:
    model = ServedModel(model_info(), LIMITS, MAX_KEPT_TOKENS)
    ledger, spec = Ledger("a"), every(model)
    assert model.has_room(ledger, spec, 4096)  # whatever it is, it is alone
    for _ in range(4):
        assert model.has_room(ledger, spec, 100)
        ledger.reserve(100, spec.answer_bytes(100))
    assert not model.has_room(ledger, model.no_outputs, 1)
    ledger.answered(100, 7, spec.answer_bytes(100))
    assert model.has_room(ledger, spec, 200)
    assert not model.has_room(ledger, spec, 213)
    assert model.has_room(ledger, model.no_outputs, 4096)
    assert not model.has_room(ledger, model.no_outputs, 8192)
