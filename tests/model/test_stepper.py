"""The stepper against the transcription, and the slab's promise that no session sees another's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellserve_model import CELLS, DeviceError, ModelError, Stepper, StepResult, Want, load_stepper
from cellserve_model import outputs as outputs_module
from tests.model.loading import LoadStepper
from tests.support.models import write_tiny_model
from tests.support.oracle import Oracle

TOLERANCE = 5e-6
VOCAB, WIDTH, OUTPUTS = 7, 3, 7

Tokens = NDArray[Any]


@dataclass
class Reference:
    """Sessions run one by one by the transcription, from the beginning each time."""

    oracle: Oracle
    history: dict[int, Tokens]

    def step(self, slots: list[int], runs: list[Tokens], wants: list[list[int]], top_k: int) -> dict[str, list[Any]]:
        expected: dict[str, list[Any]] = {
            name: [] for name in ("next_tokens", "top_tokens", "top_logprobs", "logprobs", "logits", "states", "gates")
        }
        for slot, run, row_wants in zip(slots, runs, wants, strict=True):
            first = len(self.history.get(slot, run[:0]))
            self.history[slot] = np.concatenate((self.history.get(slot, run[:0]), run))
            trace = self.oracle.run(self.history[slot])
            for number, want in enumerate(row_wants):
                logits = trace.logits[first + number + 1]
                if want & Want.NEXT_TOKEN:
                    expected["next_tokens"].append(logits.argmax())
                if want & Want.TOP_K:
                    likeliest = np.argsort(-logits)[:top_k]
                    expected["top_tokens"].append(likeliest)
                    expected["top_logprobs"].append(logits[likeliest] - np.log(np.exp(logits).sum()))
                if want & Want.LOGPROB:
                    expected["logprobs"].append(trace.logprobs(self.history[slot])[first + number])
                if want & Want.LOGITS:
                    expected["logits"].append(logits)
                if want & Want.STATE:
                    expected["states"].append(trace.states[first + number])
                if want & Want.GATES:
                    expected["gates"].append(trace.gates[first + number])
        return expected


def _submit(stepper: Stepper, slots: list[int], runs: list[Tokens], wants: list[list[int]], top_k: int) -> StepResult:
    joined = np.concatenate(runs)
    tokens = joined.astype(np.uint32) if joined.ndim == 1 else joined.astype(np.float32)
    return stepper.collect(
        stepper.submit(
            np.array(slots),
            np.array([len(run) for run in runs]),
            tokens,
            np.concatenate([np.array(row, dtype=np.uint8) for row in wants]),
            top_k,
        )
    )


def _check(result: StepResult, expected: dict[str, list[Any]]) -> None:
    for name, values in expected.items():
        found = getattr(result, name)
        assert len(found) == len(values), name
        if values:
            np.testing.assert_allclose(found, np.array(values), atol=TOLERANCE, err_msg=name)


def _write(directory: Path, cell: str, kind: str, num_layers: int, *, output_size: int | None = OUTPUTS) -> Path:
    return write_tiny_model(
        directory,
        cell,
        num_layers=num_layers,
        hidden_size=9,
        vocab_size=VOCAB if kind == "tokens" else None,
        input_size=WIDTH if kind == "vectors" else None,
        output_size=output_size,
        seed=3,
    )


def _run(random: np.random.Generator, kind: str, length: int) -> Tokens:
    if kind == "tokens":
        return random.integers(0, VOCAB, length)
    return random.standard_normal((length, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_ticks_with_mixed_outputs_equal_the_transcription(
    tmp_path: Path, load: LoadStepper, cell: str, num_layers: int, kind: str, deterministic: bool
) -> None:
    directory = _write(tmp_path, cell, kind, num_layers)
    stepper = load(directory, deterministic=deterministic)
    reference = Reference(Oracle(directory), {})
    random = np.random.default_rng(0)
    possible = 63 if kind == "tokens" else 63 & ~Want.LOGPROB
    for _ in range(4):
        slots = random.choice(np.arange(1, 9), 5, replace=False).tolist()
        runs = [_run(random, kind, length) for length in random.integers(1, 6, 5)]
        wants = [(random.integers(0, 64, len(run)) & possible).tolist() for run in runs]
        _check(_submit(stepper, slots, runs, wants, 3), reference.step(slots, runs, wants, 3))


@pytest.mark.parametrize("want", [0, *Want, Want.NEXT_TOKEN | Want.LOGPROB, Want(63)])
def test_single_tokens_with_the_same_outputs_for_all_equal_the_transcription(
    tmp_path: Path, load: LoadStepper, want: int
) -> None:
    directory = _write(tmp_path, "gru", "tokens", 1)
    stepper, reference, random = load(directory), Reference(Oracle(directory), {}), np.random.default_rng(0)
    for _ in range(3):
        slots = random.permutation(np.arange(1, 8)).tolist()
        runs = [_run(random, "tokens", 1) for _ in slots]
        wants = [[want]] * 7
        _check(_submit(stepper, slots, runs, wants, 2), reference.step(slots, runs, wants, 2))


def test_a_model_without_head_gives_states_and_gates(tmp_path: Path, load: LoadStepper) -> None:
    directory = _write(tmp_path, "lstm", "vectors", 2, output_size=None)
    stepper, reference = load(directory), Reference(Oracle(directory), {})
    runs = [_run(np.random.default_rng(0), "vectors", 4)]
    wants = [[0, Want.STATE, Want.GATES, Want.STATE | Want.GATES]]
    _check(_submit(stepper, [3], runs, wants, 0), reference.step([3], runs, wants, 0))


def test_a_head_that_is_run_in_parts_gives_the_same(
    tmp_path: Path, load: LoadStepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _write(tmp_path, "gru", "tokens", 1)
    random = np.random.default_rng(0)
    runs = [_run(random, "tokens", length) for length in (5, 1, 9, 2)]
    wants = [random.integers(0, 16, len(run)).tolist() for run in runs]
    for same_for_all in (wants, [[15]] * 4):
        given_runs = runs if same_for_all is wants else [run[:1] for run in runs]
        whole = _submit(load(directory), [1, 2, 3, 4], given_runs, same_for_all, 2)
        monkeypatch.setattr(outputs_module, "_MAX_LOGITS_AT_ONCE", 3 * OUTPUTS)
        parts = _submit(load(directory), [1, 2, 3, 4], given_runs, same_for_all, 2)
        monkeypatch.undo()
        for name in ("next_tokens", "top_tokens", "top_logprobs", "logprobs", "logits"):
            assert len(getattr(whole, name)) > 0
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)


def test_arrays_that_must_not_be_written_are_read(tmp_path: Path, load: LoadStepper) -> None:
    for kind in ("tokens", "vectors"):
        directory = _write(tmp_path / kind, "gru", kind, 1)
        run = _run(np.random.default_rng(0), kind, 3).astype(np.uint32 if kind == "tokens" else np.float32)
        arrays = [np.array([2]), np.array([3]), run, np.full(3, Want.STATE, dtype=np.uint8)]
        for array in arrays:
            array.flags.writeable = False
        stepper = load(directory)
        assert len(stepper.collect(stepper.submit(*arrays, 0)).states) == 3  # type: ignore[call-arg,arg-type]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_tick_leaves_every_other_slot_as_it_was_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, load: LoadStepper, cell: str, deterministic: bool, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"isolation-{cell}"
    if not directory.exists():
        _write(directory, cell, "tokens", 2)
    stepper = load(directory, num_slots=12, deterministic=deterministic)
    everything = np.arange(1, 13)
    random = np.random.default_rng(0)
    stepper.write_rows(everything, random.uniform(-1, 1, (12, 2, stepper.info.state_size)).astype(np.float32))
    before = stepper.read_rows(everything)
    slots = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=11, unique=True))
    runs = [_run(random, "tokens", data.draw(st.integers(1, 4))) for _ in slots]
    if data.draw(st.booleans()):
        _submit(stepper, slots, runs, [[63] * len(run) for run in runs], 2)
    else:
        _generate(stepper, slots, 3, stop_tokens=[[2]] * len(slots))
    after = stepper.read_rows(everything)
    others = [slot for slot in everything.tolist() if slot not in slots]
    assert after[np.array(others, dtype=int) - 1].tobytes() == before[np.array(others, dtype=int) - 1].tobytes()
    assert (after[np.array(slots) - 1] != before[np.array(slots) - 1]).any(axis=(1, 2)).all()


def _generate(stepper: Stepper, slots: list[int], num_tokens: int, stop_tokens: list[list[int]]) -> None:
    size = len(slots)
    stepper.collect(
        stepper.submit_generate(
            np.array(slots),
            np.full(size, num_tokens),
            np.zeros(size, dtype=np.int64),
            np.arange(size, dtype=np.uint64),
            np.ones(size, dtype=np.float32),
            np.zeros(size, dtype=np.int64),
            np.ones(size, dtype=np.float32),
            np.array(stop_tokens, dtype=np.int64),
        )
    )


def test_a_row_does_not_depend_on_the_order_of_the_batch(tmp_path: Path, load: LoadStepper) -> None:
    directory = _write(tmp_path, "gru", "tokens", 2)
    random = np.random.default_rng(0)
    runs = [_run(random, "tokens", length) for length in (3, 1, 4, 1, 5)]
    wants = [[15] * len(run) for run in runs]
    forwards, backwards = load(directory), load(directory)
    first = _submit(forwards, [1, 2, 3, 4, 5], runs, wants, 2)
    second = _submit(backwards, [5, 4, 3, 2, 1], runs[::-1], wants[::-1], 2)
    ends = np.cumsum([len(run) for run in runs])
    rows = [np.arange(end - len(run), end) for run, end in zip(runs, ends, strict=True)]
    order = np.concatenate(rows[::-1])
    np.testing.assert_allclose(second.logits, first.logits[order], atol=1e-6)
    np.testing.assert_allclose(forwards.read_rows(np.arange(1, 6)), backwards.read_rows(np.arange(1, 6)), atol=1e-6)


def test_rows_are_written_read_copied_and_zeroed(tmp_path: Path, load: LoadStepper) -> None:
    for deterministic in (False, True):
        stepper = load(_write(tmp_path / str(deterministic), "lstm", "tokens", 2), deterministic=deterministic)
        states = np.random.default_rng(0).standard_normal((4, 2, 18)).astype(np.float32)
        slots = np.array([5, 1, 9, 3])
        stepper.write_rows(slots, states)
        assert stepper.read_rows(slots).tobytes() == states.tobytes()
        stepper.copy_rows(np.array([5, 1]), np.array([1, 5]))
        assert stepper.read_rows(np.array([1, 5])).tobytes() == states[:2].tobytes()
        stepper.zero_rows(np.array([9]))
        assert not stepper.read_rows(np.array([9])).any()
        assert stepper.read_rows(np.array([3])).tobytes() == states[3:].tobytes()
        with pytest.raises(ValueError, match=r"states have shape \(4, 2, 9\)"):
            stepper.write_rows(slots, states[:, :, :9])


def test_a_state_moved_to_another_slot_goes_on_as_if_it_had_stayed(tmp_path: Path, load: LoadStepper) -> None:
    stepper = load(_write(tmp_path, "gru", "tokens", 1))
    random = np.random.default_rng(0)
    first, second = _run(random, "tokens", 5), _run(random, "tokens", 5)
    _submit(stepper, [2], [first], [[0] * 5], 0)
    stepper.write_rows(np.array([7]), stepper.read_rows(np.array([2])))
    result = _submit(stepper, [2, 7], [second, second], [[Want.STATE] * 5] * 2, 0)
    np.testing.assert_allclose(result.states[:5], result.states[5:], atol=1e-6)


def test_the_information_says_what_was_loaded(tmp_path: Path, load: LoadStepper) -> None:
    info = load(_write(tmp_path, "lstm", "tokens", 2)).info
    assert (info.name, info.version, info.cell, info.device) == ("tiny", 1, "lstm", "cpu")
    assert (info.num_layers, info.hidden_size, info.state_size) == (2, 9, 18)
    assert (info.input_kind, info.vocab_size, info.input_size, info.output_size) == ("tokens", VOCAB, None, OUTPUTS)
    assert info.gate_names == ("input", "forget", "output")
    assert info.num_parameters == 7 * 5 + (36 * 5 + 36 * 9 + 36) + (36 * 9 + 36 * 9 + 36) + (7 * 9 + 7)
    assert len(info.fingerprint) == 32


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"), ("cuda:99", "device 'cuda:99'")],
)
def test_an_impossible_device_is_refused(tmp_path: Path, device: str, words: str) -> None:
    directory = _write(tmp_path, "gru", "tokens", 1)
    with pytest.raises(DeviceError) as caught:
        load_stepper(directory, name="tiny", version=1, device=device, num_slots=4)
    assert words in str(caught.value)


def test_more_slots_than_memory_is_refused_with_their_size(tmp_path: Path) -> None:
    directory = _write(tmp_path, "gru", "tokens", 1)
    with pytest.raises(DeviceError, match=r"slots need .* GiB of memory, which are not free; use fewer slots"):
        load_stepper(directory, name="tiny", version=1, device="cpu", num_slots=10**13)


def test_ticks_of_a_wrong_shape_are_refused(tmp_path: Path, load: LoadStepper) -> None:
    stepper = load(_write(tmp_path, "gru", "tokens", 1), max_batch=2)
    ids = np.zeros(3, dtype=np.uint32)
    ones = np.ones(3, dtype=np.int64)
    with pytest.raises(ValueError, match="a tick of 3 rows; it has 1 to 2"):
        stepper.submit(np.array([1, 2, 3]), ones, ids, np.zeros(3, np.uint8), 0)
    with pytest.raises(ValueError, match="3 tokens and 2 wants"):
        stepper.submit(np.array([1, 2]), ones[:2], ids, np.zeros(2, np.uint8), 0)


def test_a_model_that_cannot_generate_says_so(tmp_path: Path, load: LoadStepper) -> None:
    stepper = load(_write(tmp_path, "gru", "vectors", 1))
    with pytest.raises(ModelError, match="cannot generate: it needs token input"):
        _generate(stepper, [1], 1, [[]])
