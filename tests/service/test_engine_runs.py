"""Runs, one after the other: validated whole, accepted whole, answered once. The driver checks every answer."""

from typing import Any

import numpy as np
import pytest

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputSpec
from tests.service.driving import UNARY, Driver, Row

EVERY = OutputSpec(at=At.EVERY, next_token=True, top_k=3, logprobs=True, head_outputs=True, states=True, gates=True)
LAST = OutputSpec(at=At.LAST, next_token=True)


def test_a_run_gives_what_its_tokens_make_of_the_state_and_moves_the_position() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1, 2, 3], 0), outputs=EVERY)
    driver.begin()
    driver.finish()
    assert driver.said[0].facts[:3] == (3, 3, 0)
    outputs: Any = driver.said[0].facts[3]
    assert len(outputs) == 3
    assert driver.plain_of("a").position == 3
    driver.end()


@pytest.mark.parametrize("field", ["next_token", "top_k", "logprobs", "head_outputs", "states", "gates"])
@pytest.mark.parametrize("at", [At.LAST, At.EVERY])
def test_every_output_can_be_asked_for_alone(field: str, at: At) -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    asked = {"top_k": 2} if field == "top_k" else {field: True}
    driver.run(stream, Row(handle, [4, 5, 6], 0), outputs=OutputSpec(at=at, **asked))
    driver.settle()
    driver.end()


def test_sessions_that_ask_for_different_outputs_share_a_tick_and_get_their_own() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    specs = [EVERY, LAST, OutputSpec(), OutputSpec(at=At.EVERY, top_k=5)]
    for place, spec in enumerate(specs):
        stream = (one, other)[place % 2]
        handle = driver.opened(stream, f"s{place}")
        driver.run(stream, Row(handle, [place, 3, 1, place, 2][: place + 2], 0), outputs=spec)
    driver.begin()
    assert len(driver.ticks[0].rows) == 4
    driver.finish()
    driver.end()


def test_runs_of_one_session_in_one_command_take_effect_in_their_order() -> None:
    driver = Driver()
    stream = driver.new_stream()
    a, b = driver.opened(stream, "a"), driver.opened(stream, "b")
    rows = [Row(b, [6], 0), Row(a, [1, 2], 0), Row(a, [3], 2), Row(b, [5, 5], 1), Row(a, [4, 0, 1], 3)]
    driver.run(stream, *rows, outputs=EVERY)
    driver.settle()
    assert [driver.plain_of(name).position for name in "ab"] == [6, 3]
    driver.end()


def test_tokens_of_several_sessions_are_never_mixed_up_when_rows_come_in_any_order() -> None:
    driver = Driver(EngineLimits(max_sessions=8), max_batch=8)
    stream = driver.new_stream()
    handles = [driver.opened(stream, f"s{place}") for place in range(6)]
    # The last session twice, so that its rows take turns, and the table's rows in falling order.
    rows = [Row(handle, [place, 6 - place, place][: 1 + place % 3], 0) for place, handle in enumerate(handles)][::-1]
    driver.run(stream, *rows, Row(handles[5], [2, 2], 3), outputs=EVERY)
    driver.settle()
    driver.end()


def test_a_run_without_a_position_is_appended_to_an_idle_session_and_refused_behind_another() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1]))
    driver.run(stream, Row(handle, [2]))
    assert driver.reasons == ["INVALID_INPUT"]
    driver.settle()
    driver.run(stream, Row(handle, [2]))
    driver.settle()
    assert driver.plain_of("a").position == 2
    driver.end()


def test_a_single_step_waits_for_one_part_of_a_long_run_and_has_the_next_tick_to_itself() -> None:
    limits = EngineLimits(max_sessions=4, max_slice_tokens=10, max_sliced_tick_tokens=9)
    driver = Driver(limits)
    stream = driver.new_stream()
    long, short = driver.opened(stream, "long"), driver.opened(stream, "short")
    driver.run(stream, Row(long, [1] * 40, 0), outputs=LAST)
    driver.begin()
    driver.run(stream, Row(short, [2], 0), outputs=LAST)
    driver.finish()
    driver.begin()
    assert driver.ticks[0].rows.tolist() == [driver.plain_of("short").row]
    assert driver.engine.goes_on  # the long run is next, whatever comes
    driver.finish()
    driver.begin()
    assert driver.ticks[0].rows.tolist() == [driver.plain_of("long").row]
    assert not driver.engine.goes_on  # a single step may come
    driver.finish()
    assert [batch.tolist() for batch in driver.steppers[0].batches[:3]] == [[9], [1], [9]]
    driver.end()


def test_a_long_answer_comes_in_slices_that_fit_a_message() -> None:
    limits = EngineLimits(max_sessions=4, max_answer_bytes=64)
    driver = Driver(limits)
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1, 2, 3, 4, 5], 0), outputs=OutputSpec(at=At.EVERY, states=True))
    slices = []
    while driver.begin():
        driver.finish()
        slices.append(driver.said[0].facts[:3])
    assert slices == [(2, 2, 3), (4, 2, 1), (5, 1, 0)]
    driver.end()


def test_outputs_at_the_last_token_do_not_slice_a_run() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_answer_bytes=64))
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1] * 20, 0), outputs=OutputSpec(at=At.LAST, states=True))
    driver.settle()
    assert driver.steppers[0].batches[0].tolist() == [20]
    driver.end()


def test_one_tick_has_no_more_outputs_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellserve_service.scheduling.MAX_TICK_OUTPUT_BYTES", 60)
    driver = Driver()
    stream = driver.new_stream()
    handles = [driver.opened(stream, name) for name in "abcde"]
    driver.run(stream, *(Row(handle, [1], 0) for handle in handles), outputs=OutputSpec(at=At.LAST, states=True))
    ticks = []
    while driver.begin():
        ticks.append(driver.ticks[0].rows.tolist())
        driver.finish()
    # Those that found no room in the first batch come before those that were not chosen for it.
    assert ticks == [[driver.plain_of(name).row for name in names] for names in ("ab", "cd", "e")]
    driver.end()


def test_sessions_take_their_turns_in_the_order_in_which_they_became_ready() -> None:
    driver = Driver(max_batch=2)
    stream = driver.new_stream()
    handles = {name: driver.opened(stream, name) for name in "abcd"}
    rows = [driver.plain_of(name).row for name in "dacb"]
    for name in "dacb":
        driver.run(stream, Row(handles[name], [1], 0))
    driver.begin()
    driver.begin()
    assert [row for tick in driver.ticks for row in tick.rows.tolist()] == rows
    driver.finish()
    driver.finish()
    driver.end()


def test_a_long_run_of_a_slow_model_is_sliced_by_the_time_that_its_tokens_take() -> None:
    driver = Driver(EngineLimits(max_sessions=4))
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.steppers[0].compute_seconds = 1.0
    driver.run(stream, Row(handle, [1] * 600, 0), outputs=LAST)
    driver.settle()
    # The first tick's length is a guess, the second's follows from 256 tokens in a second.
    assert [counts.tolist() for counts in driver.steppers[0].batches[:4]] == [[256], [2], [1], [1]]
    driver.end()


def test_models_take_turns() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=32))
    stream = driver.new_stream()
    tokens, vectors = driver.opened(stream, "t"), driver.opened(stream, "v", model="vectors")
    driver.run(stream, Row(tokens, [1] * 100, 0))
    driver.run(stream, Row(vectors, [(1.0, 2.0)] * 100, 0))
    names = []
    for _ in range(4):
        driver.begin()
        names.append(driver.ticks[0].served.info.name)
        driver.finish()
    assert names == ["fake", "vectors", "fake", "vectors"]
    driver.end()


@pytest.mark.parametrize(
    ("model", "tokens", "reason"),
    [
        ("fake", [7], "INVALID_INPUT"),
        ("fake", [0, 0, 2**32 - 1], "INVALID_INPUT"),
        ("fake", [], "INVALID_INPUT"),
        ("fake", [0] * 5000, "INVALID_INPUT"),
        ("fake", [(1.0, 2.0)], "INVALID_INPUT"),
        ("vectors", [1, 2], "INVALID_INPUT"),
        ("vectors", [(1.0, np.nan)], "INVALID_INPUT"),
        ("vectors", [(0.0, 0.0), (np.inf, 1.0)], "INVALID_INPUT"),
    ],
)
def test_a_run_that_the_model_cannot_take_is_refused_whole_and_moves_nothing(
    model: str, tokens: list[int], reason: str
) -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a", model=model)
    driver.run(stream, Row(handle, tokens, 0))
    assert driver.reasons == [reason]
    assert not driver.begin()
    driver.end()


def test_a_bad_row_does_not_touch_the_rows_beside_it() -> None:
    driver = Driver()
    stream = driver.new_stream()
    a, b, c = (driver.opened(stream, name) for name in "abc")
    rows = [Row(a, [1, 2], 0), Row(b, [1, 9], 0), Row(b, [], 0), Row(c, [3], 5), Row(c, [3, 4], 0), Row(12345, [6], 0)]
    driver.run(stream, *rows, outputs=LAST)
    assert sorted(driver.reasons) == ["INVALID_INPUT", "INVALID_INPUT", "POSITION_GAP", "STALE_HANDLE"]
    driver.settle()
    assert [driver.plain_of(name).position for name in "abc"] == [2, 0, 2]
    driver.end()


def test_vectors_of_another_width_are_refused() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "v", model="vectors")
    driver.run(stream, Row(handle, [(1.0, 2.0)], 0))
    command_reasons = driver.submit_raw(stream, handle, vectors=np.zeros((1, 3), np.float32))
    assert command_reasons == ["INVALID_INPUT"]
    driver.end()


def test_rows_of_another_model_than_the_first_are_refused() -> None:
    driver = Driver()
    stream = driver.new_stream()
    tokens, vectors = driver.opened(stream, "t"), driver.opened(stream, "v", model="vectors")
    driver.run(stream, Row(tokens, [1], 0), Row(vectors, [1], 0))
    assert driver.reasons == ["INVALID_INPUT"]
    driver.end()


def test_outputs_that_a_model_does_not_have_are_refused() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "v", model="vectors")
    for lacking in ({"next_token": True}, {"top_k": 1}, {"logprobs": True}, {"gates": True}):
        driver.run(stream, Row(handle, [(1.0, 1.0)], 0), outputs=OutputSpec(at=At.LAST, **lacking))
        assert driver.reasons == ["OUTPUT_UNSUPPORTED"]
    driver.end()


def test_a_session_may_have_only_so_many_tokens_waiting() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_session_pending_tokens=5))
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1, 1, 1], 0), Row(handle, [2, 2, 2], 3), Row(handle, [3, 3], 3))
    assert driver.reasons == ["QUEUE_FULL"]
    driver.begin()
    driver.finish()
    driver.run(stream, Row(handle, [4, 4, 4], 5))
    driver.settle()
    assert driver.plain_of("a").position == 8
    driver.end()


def test_the_server_may_have_only_so_many_tokens_waiting_and_small_runs_still_fit() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_pending_tokens=6))
    stream = driver.new_stream()
    a, b, c = (driver.opened(stream, name) for name in "abc")
    driver.run(stream, Row(a, [1, 1, 1], 0), Row(b, [2] * 4, 0), Row(c, [3, 3], 0))
    assert driver.reasons == ["QUEUE_FULL"]
    driver.settle()
    driver.run(stream, Row(b, [2] * 4, 0))
    driver.end()


def test_thousands_of_runs_of_one_session_in_one_command_are_decided_over_once_each() -> None:
    driver = Driver(EngineLimits(max_sessions=2, max_session_pending_tokens=20))
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, *(Row(handle, [1], place) for place in range(3000)))
    assert driver.reasons == ["QUEUE_FULL"] * 2980
    driver.end()


def test_a_step_by_id_needs_no_stream_and_takes_nothing_over() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(UNARY, Row("a", [1, 2]), outputs=EVERY)
    driver.settle()
    driver.run(stream, Row(handle, [3], 2))
    driver.settle()
    driver.run(UNARY, Row("nobody", [1]))
    assert driver.reasons == ["SESSION_NOT_FOUND"]
    driver.end()


def test_an_answer_that_a_unary_call_could_not_carry_is_refused_before_the_run() -> None:
    driver = Driver()
    driver.open(UNARY, ["a"], unary=True)
    wide = OutputSpec(at=At.EVERY, states=True)  # 24 bytes a token
    assert driver.submit_raw(UNARY, "a", tokens=[1, 2, 3], outputs=wide, max_output_bytes=71) == ["INVALID_INPUT"]
    assert not driver.begin()
    assert driver.submit_raw(UNARY, "a", tokens=[1, 2, 3], outputs=wide, max_output_bytes=72) == []
