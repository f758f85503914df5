"""Sampling on the server: slices, repeats, breaking off. The driver checks every token against the plain sessions."""

import pytest

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputSpec
from cellserve_service.pace import MAX_SLICE_TOKENS
from tests.service.driving import UNARY, Driver, Row

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)


def _driver(limits: EngineLimits | None = None, *, max_batch: int = 4) -> Driver:
    driver = Driver(limits, max_batch=max_batch)
    driver.open(UNARY, ["a"], unary=True)
    driver.run(UNARY, Row("a", [1, 2, 3]), outputs=EVERY)
    driver.settle()
    return driver


def _slice(driver: Driver) -> tuple[int, bool, bool]:
    """Runs one tick; how many tokens it streamed, whether it finished the generate, whether by a stop token."""
    assert driver.begin()
    driver.finish()
    facts = next(record.facts for record in driver.said if record.kind == "generated")
    return len(facts[0]), bool(facts[3]), bool(facts[4])  # type: ignore[arg-type]


def test_a_generate_streams_slices_that_add_up_and_moves_the_position_by_as_many_tokens() -> None:
    driver = _driver()
    driver.generate("a", 2 * MAX_SLICE_TOKENS + 3)
    assert [_slice(driver)[0] for _ in range(3)] == [MAX_SLICE_TOKENS, MAX_SLICE_TOKENS, 3]
    assert not driver.begin()
    assert driver.plain_of("a").position == 3 + 2 * MAX_SLICE_TOKENS + 3
    driver.end()


def test_a_stop_token_is_the_last_one_streamed_and_is_consumed() -> None:
    driver = _driver()
    driver.generate("a", 500, stop_tokens=(0, 3))
    driver.settle()
    last = driver.plain_of("a").held[-1]
    assert last.tokens[-1] in (0, 3)
    assert not {0, 3} & set(last.tokens[:-1])
    driver.end()


def test_generates_of_several_sessions_share_ticks_each_with_its_own_settings() -> None:
    driver = _driver(max_batch=6)
    driver.open(UNARY, ["b", "c"], unary=True)
    driver.generate("a", 5, temperature=0.0)
    driver.generate("b", 40, stop_tokens=(2,))
    driver.generate("c", 40, seed=2**64 - 1)
    driver.begin()
    counts = driver.ticks[0].ticket.result.counts.tolist()
    assert len(counts) == 3
    assert counts[0] == 5  # one that is nearly done makes nobody's slice short
    assert counts[2] == MAX_SLICE_TOKENS
    driver.end()


def test_runs_and_other_generates_are_refused_while_one_is_under_way() -> None:
    driver = _driver()
    driver.generate("a", 100)
    for in_tick in (False, True):
        if in_tick:
            driver.begin()
        driver.run(UNARY, Row("a", [1], 3))
        assert driver.reasons == ["SESSION_BUSY"]
        driver.generate("a", 5)
        assert driver.reasons == ["SESSION_BUSY"]
        driver.generate("a", 5, position=3, seed=99)
        assert driver.reasons == ["SESSION_BUSY"]
        driver.generate("a", 5, position=1000)
        assert driver.reasons == ["SESSION_BUSY"]
    driver.end()


def test_a_generate_waits_for_the_runs_before_it_and_runs_behind_it_are_refused() -> None:
    driver = _driver()
    driver.run(UNARY, Row("a", [1, 1], 3), outputs=EVERY)
    driver.generate("a", 4, position=5)
    driver.run(UNARY, Row("a", [1], 5))
    assert driver.reasons == ["SESSION_BUSY"]
    driver.settle()
    assert driver.plain_of("a").position == 9
    driver.end()


@pytest.mark.parametrize(
    ("position", "reason"), [(4, "POSITION_GAP"), (2, "POSITION_CONFLICT"), (0, "POSITION_CONFLICT")]
)
def test_a_generate_for_another_position_than_the_session_s_is_refused(position: int, reason: str) -> None:
    driver = _driver()
    driver.generate("a", 4, position=position)
    assert driver.said[0].facts == (reason, 3)
    driver.end()


def test_a_generate_whose_tokens_are_no_longer_held_cannot_be_repeated() -> None:
    driver = _driver(EngineLimits(max_sessions=4, max_held_answers=1))
    driver.generate("a", 3 * MAX_SLICE_TOKENS, position=3)
    driver.settle()
    driver.generate("a", 3 * MAX_SLICE_TOKENS, position=3)
    assert driver.reasons == ["ANSWER_NOT_HELD"]
    driver.end()


def test_a_model_without_vocabulary_cannot_generate() -> None:
    driver = Driver()
    driver.open(UNARY, ["v"], model="vectors", unary=True)
    driver.generate("v")
    assert driver.reasons == ["OUTPUT_UNSUPPORTED"]
    driver.generate("nobody")
    assert driver.reasons == ["SESSION_NOT_FOUND"]
    driver.end()


def test_stop_tokens_are_tokens_of_the_model() -> None:
    driver = _driver()
    driver.generate("a", 4, stop_tokens=(3, 7))
    assert driver.reasons == ["INVALID_INPUT"]
    driver.end()


def test_a_repeat_of_a_finished_generate_gives_the_same_tokens_and_moves_nothing() -> None:
    driver = _driver()
    driver.generate("a", 40, position=3)
    driver.settle()
    tokens = [token for held in driver.plain_of("a").held for token in held.tokens]
    driver.generate("a", 40, position=3)
    assert driver.said[0].facts[0] == tuple(tokens)
    assert driver.said[0].facts[2:4] == (43, True)
    driver.generate("a", 30, position=13)
    assert driver.said[0].facts[0] == tuple(tokens[10:])
    assert not driver.begin()
    driver.end()


def test_a_repeat_of_a_generate_that_was_broken_off_goes_on_where_that_ended() -> None:
    driver = _driver()
    first = driver.generate("a", 50, position=3)
    _slice(driver)
    driver.cancel(UNARY, first)
    assert driver.kinds(first) == ["failed"]
    again = driver.generate("a", 50, position=3)
    assert driver.kinds(again) == ["generated"]
    driver.settle()
    undisturbed = _driver()
    undisturbed.generate("a", 50)
    undisturbed.settle()
    assert (driver.plain_of("a").state == undisturbed.plain_of("a").state).all()
    assert driver.plain_of("a").position == 53
    driver.end()


def test_a_repeat_takes_the_place_of_a_generate_that_is_between_ticks() -> None:
    driver = _driver()
    first = driver.generate("a", 50, position=3)
    _slice(driver)
    again = driver.generate("a", 50, position=3)
    assert driver.kinds(first) == ["failed"]
    assert driver.kinds(again) == ["generated"]
    driver.settle()
    assert driver.plain_of("a").position == 53
    driver.end()


def test_repeats_of_a_generate_in_a_tick_wait_for_it_and_the_last_one_wins() -> None:
    driver = _driver()
    first = driver.generate("a", 50, position=3)
    driver.begin()
    second = driver.generate("a", 50, position=3)
    third = driver.generate("a", 50, position=3)
    assert driver.kinds(second) == ["failed"]
    driver.finish()
    assert driver.kinds(first) == ["failed", "generated"]
    assert driver.kinds(third) == ["generated"]
    driver.settle()
    assert driver.plain_of("a").position == 53
    driver.end()


def test_a_thousand_repeats_in_one_tick_do_not_pile_up() -> None:
    driver = _driver()
    driver.generate("a", 50, position=3)
    driver.begin()
    for _ in range(1000):
        driver.generate("a", 50, position=3)
    driver.end()
    assert not driver.unanswered


def test_a_repeat_that_cannot_be_answered_does_not_break_off_what_is_under_way() -> None:
    driver = _driver(EngineLimits(max_sessions=4, max_held_answers=1))
    first = driver.generate("a", 60, position=3)
    for _ in range(2):
        _slice(driver)
    driver.generate("a", 60, position=3)
    assert driver.reasons == ["ANSWER_NOT_HELD"]
    driver.settle()
    assert driver.plain_of("a").position == 63
    assert (UNARY, first) not in driver.unanswered
    driver.end()


def test_a_repeat_ends_at_the_stop_token_though_later_tokens_have_the_same_settings() -> None:
    driver = _driver()
    driver.generate("a", 500, position=3, stop_tokens=(2,))
    driver.settle()
    first_end = driver.plain_of("a").position
    driver.generate("a", 500, position=first_end, stop_tokens=(2,))
    driver.settle()
    assert driver.plain_of("a").position > first_end
    driver.generate("a", 500, position=3, stop_tokens=(2,))
    assert driver.said[0].facts[2:5] == (first_end, True, True)
    driver.end()


def test_a_repeat_behind_which_other_tokens_have_run_gives_no_half_answer() -> None:
    driver = _driver()
    first = driver.generate("a", 50, position=3)
    _slice(driver)
    driver.cancel(UNARY, first)
    driver.run(UNARY, Row("a", [1]))
    driver.settle()
    driver.generate("a", 50, position=3)
    assert driver.reasons == ["POSITION_CONFLICT"]
    driver.generate("a", MAX_SLICE_TOKENS, position=3)
    assert driver.reasons == []
    driver.end()


def test_a_broken_off_generate_in_a_tick_keeps_what_it_has_consumed() -> None:
    driver = _driver()
    generate = driver.generate("a", 50)
    driver.begin()
    driver.cancel(UNARY, generate)
    assert driver.said == []
    driver.finish()
    assert driver.kinds(generate) == ["failed", "generated"]
    assert driver.plain_of("a").position == 3 + MAX_SLICE_TOKENS
    driver.run(UNARY, Row("a", [1], 3 + MAX_SLICE_TOKENS), outputs=EVERY)
    driver.end()


def test_a_generate_that_ends_in_the_tick_in_which_it_is_broken_off_is_finished() -> None:
    driver = _driver()
    generate = driver.generate("a", 4)
    driver.begin()
    driver.cancel(UNARY, generate)
    driver.finish()
    assert driver.kinds(generate) == ["generated"]
    driver.end()


def test_a_cancelled_repeat_leaves_and_the_generate_before_it_is_still_broken_off() -> None:
    driver = _driver()
    first = driver.generate("a", 50, position=3)
    driver.begin()
    second = driver.generate("a", 50, position=3)
    driver.cancel(UNARY, second)
    assert driver.kinds(second) == ["failed"]
    driver.finish()
    assert driver.kinds(first) == ["failed", "generated"]
    assert not driver.begin()
    driver.end()


def test_an_attach_breaks_a_generate_off_and_waits_for_its_tick_to_tell_the_position() -> None:
    driver = _driver()
    stream = driver.new_stream()
    generate = driver.generate("a", 50, position=3)
    driver.begin()
    (attach,) = driver.open(stream, ["a"])
    assert driver.said == []
    driver.finish()
    assert driver.kinds(generate) == ["failed", "generated"]
    assert next(r.facts for r in driver.said if r.request == attach) == ("a", 3 + MAX_SLICE_TOKENS, 2, False)
    assert not driver.begin()
    driver.end()


def test_a_second_attach_while_the_first_one_waits_makes_the_first_handle_worthless() -> None:
    driver = _driver()
    one, other = driver.new_stream(), driver.new_stream()
    driver.generate("a", 50)
    driver.begin()
    (first,) = driver.open(one, ["a"])
    (second,) = driver.open(other, ["a"])
    assert [record.facts for record in driver.said] == [("SESSION_MOVED",)]
    driver.finish()
    assert driver.kinds(first) == driver.kinds(second) == ["opened"]
    grips = {grip.stream: grip.handle for grip in driver.plain.grips if grip.handle}
    driver.run(one, Row(grips[one], [1], 19))
    assert driver.reasons == ["SESSION_MOVED"]
    driver.run(other, Row(grips[other], [1], 19), outputs=EVERY)
    assert driver.reasons == []
    driver.end()


def test_an_attach_between_ticks_breaks_a_generate_off_at_once() -> None:
    driver = _driver()
    generate = driver.generate("a", 50)
    _slice(driver)
    driver.open(driver.new_stream(), ["a"])
    assert driver.kinds(generate) == ["failed"]
    assert "SESSION_MOVED" in driver.reasons
    assert not driver.begin()
    driver.end()


def test_a_unary_open_of_several_sessions_answers_once_when_all_their_ticks_are_over() -> None:
    driver = _driver()
    driver.open(UNARY, ["b"], unary=True)
    for name in "ab":
        driver.generate(name, 50)
    driver.begin()
    driver.open(UNARY, ["a", "c", "b"], unary=True)
    assert driver.said == []
    driver.finish()
    assert [record.facts[0] for record in driver.said if record.kind == "opened"] == ["a", "b", "c"]
    driver.end()


def test_a_close_waits_for_the_attach_that_waits_for_a_generate() -> None:
    driver = _driver()
    stream = driver.new_stream()
    driver.generate("a", 50)
    driver.begin()
    (attach,) = driver.open(stream, ["a"])
    (close,) = driver.close(UNARY, "a")
    driver.finish()
    assert driver.kinds(attach) == ["opened"]
    assert driver.kinds(close) == ["done"]
    driver.end()


def test_withdrawing_a_run_withdraws_the_generate_that_counted_on_it() -> None:
    driver = _driver()
    run = driver.run(UNARY, Row("a", [1, 1], 3))[0]
    generate = driver.generate("a", 9)
    driver.cancel(UNARY, run)
    assert [driver.kinds(request) for request in (run, generate)] == [["failed"], ["failed"]]
    assert sorted(driver.reasons) == ["POSITION_GAP", "RUN_CANCELLED"]
    driver.run(UNARY, Row("a", [2], 3))
    assert driver.reasons == []
    driver.end()


def test_a_generate_behind_a_late_run_and_a_reset_runs_at_once_though_its_turn_was_over() -> None:
    driver = _driver()
    driver.run(UNARY, Row("a", [1, 1], 3, timeout=1.0))
    driver.reset(UNARY, "a")
    driver.generate("a", 9)
    driver.pass_time(2.0)
    # The runs' turn comes last in the round: what it withdraws must not leave the generate for another day.
    driver.engine._turn = 1
    assert driver.begin()
    driver.end()
