"""Which outputs a model can give, and how they lie in memory while they are held."""

import numpy as np
import pytest

from cellserve_service.errors import Refusal, reason_name
from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputArrays, OutputLayout, OutputSpec
from cellserve_service.served import ServedModel
from cellserve_service.sessions import SessionTable
from cellserve_service.specs import SpecTable
from tests.support.steppers import FakeModel, FakeStepper

EVERYTHING = OutputSpec(
    at=At.EVERY, next_token=True, top_k=2, logprobs=True, head_outputs=True, states=True, gates=True
)
HEADLESS = FakeModel(output_size=None, gate_names=())
CLASSIFIER = FakeModel(output_size=3)
VECTORS = FakeModel(vocab_size=None, input_size=2)


def _arrays(num_rows: int) -> OutputArrays:
    numbers = np.random.default_rng(3)

    def floats(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return numbers.normal(size=(num_rows, *shape)).astype(np.float32)

    tokens = numbers.integers(0, 2**32, size=(num_rows, 3), dtype=np.uint32)
    return OutputArrays(tokens[:, 0], tokens[:, 1:], floats(2), floats(), floats(7), floats(2, 3), floats(2, 2, 2))


def test_rows_packed_as_words_come_back_as_they_were() -> None:
    layout = OutputLayout.of(EVERYTHING, FakeModel())
    assert layout.row_words == 1 + 2 + 2 + 1 + 7 + 6 + 8
    words = np.empty((5, layout.row_words), np.uint32)
    outputs = _arrays(5)
    layout.pack(outputs, words)
    back = layout.unpack(words)
    for before, after in zip(outputs._arrays(), back._arrays(), strict=True):
        assert before.dtype == after.dtype
        assert np.array_equal(before, after)


def test_what_comes_back_is_a_copy() -> None:
    layout = OutputLayout.of(OutputSpec(at=At.LAST, next_token=True), FakeModel())
    words = np.array([[1], [2]], np.uint32)
    back = layout.unpack(words)
    words[:] = 9
    assert back.next_tokens is not None
    assert back.next_tokens.tolist() == [1, 2]


def test_rows_are_selected_and_put_together_again() -> None:
    outputs = _arrays(5)
    parts = [outputs.select(slice(0, 2)), outputs.select(np.array([2])), outputs.select(slice(3, 5))]
    for before, after in zip(outputs._arrays(), OutputArrays.concatenate(parts)._arrays(), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("model", "asked", "reason"),
    [
        (HEADLESS, {"next_token": True}, "OUTPUT_UNSUPPORTED"),
        (HEADLESS, {"head_outputs": True}, "OUTPUT_UNSUPPORTED"),
        (HEADLESS, {"gates": True}, "OUTPUT_UNSUPPORTED"),
        (CLASSIFIER, {"logprobs": True}, "OUTPUT_UNSUPPORTED"),
        (CLASSIFIER, {"top_k": 1}, "OUTPUT_UNSUPPORTED"),
        (VECTORS, {"next_token": True}, "OUTPUT_UNSUPPORTED"),
        (FakeModel(), {"top_k": 8}, "INVALID_INPUT"),
        (FakeModel(vocab_size=5000, output_size=5000), {"top_k": 1025}, "INVALID_INPUT"),
        (FakeModel(state_size=200), {"states": True}, "OUTPUT_UNSUPPORTED"),
    ],
)
@pytest.mark.parametrize("at", [At.LAST, At.EVERY])
def test_an_output_that_the_model_does_not_have_or_that_is_too_large_is_refused(
    model: FakeModel, asked: dict[str, bool], reason: str, at: At
) -> None:
    refusal = OutputSpec(at=at, **asked).check(model, max_answer_bytes=1000)
    assert refusal is not None
    assert reason_name(refusal.reason) == reason


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (HEADLESS, {"states": True}),
        (CLASSIFIER, {"head_outputs": True, "gates": True}),
        (VECTORS, {"head_outputs": True}),
        (FakeModel(), {"top_k": 7}),
        (FakeModel(vocab_size=5000, output_size=5000), {"top_k": 1024}),
    ],
)
def test_what_the_model_has_can_be_asked_for(model: FakeModel, asked: dict[str, bool]) -> None:
    assert OutputSpec(at=At.EVERY, **asked).check(model, max_answer_bytes=10_000) is None


def test_where_no_outputs_are_wanted_the_other_fields_have_no_effect() -> None:
    assert OutputSpec(at=At.NONE, next_token=True, top_k=10**9, gates=True).check(HEADLESS, 10) is None


def test_a_spec_has_one_number_and_asking_for_nothing_is_always_the_same_one() -> None:
    specs = SpecTable(FakeModel())
    nothing = [OutputSpec(), OutputSpec(at=At.EVERY), OutputSpec(at=At.LAST), OutputSpec(at=At.NONE, states=True)]
    assert {specs.number(spec, 1000) for spec in nothing} == {0}
    first = specs.number(EVERYTHING, 1000)
    assert specs.number(OutputSpec(at=At.LAST, top_k=2), 1000) != first
    assert specs.number(EVERYTHING, 1000) == first


def test_specs_that_are_refused_are_not_kept() -> None:
    specs = SpecTable(FakeModel())
    for top_k in range(8, 50):
        assert isinstance(specs.number(OutputSpec(at=At.LAST, top_k=top_k), 1000), Refusal)
    assert len(specs.layouts) == 1


@pytest.mark.parametrize(
    ("model", "can"), [(FakeModel(), True), (HEADLESS, False), (CLASSIFIER, False), (VECTORS, False)]
)
def test_only_a_head_over_the_vocabulary_can_generate(model: FakeModel, can: bool) -> None:
    limits = EngineLimits(max_sessions=2)
    assert ServedModel(0, FakeStepper(model), SessionTable(2), limits).can_generate is can
