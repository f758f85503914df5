"""What happens around streams: cancelling, timeouts, slow readers, and their end. The driver checks all of it."""

import pytest

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputSpec
from cellserve_service.runs import Batch
from cellserve_service.sessions import Stage
from tests.service.driving import UNARY, Driver, Row

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)


def test_cancelling_withdraws_what_has_not_begun_and_the_runs_behind_it_are_a_gap() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    rows = [Row(handle, [1, 2], 0), Row(handle, [3], 2), Row(handle, [4], 3), Row(handle, [5], 4)]
    first, second, third, fourth = driver.run(stream, *rows, outputs=EVERY)
    driver.begin()
    driver.cancel(stream, first, second, fourth, 12345)
    refused = {record.request: record.facts for record in driver.said}
    assert refused == {second: ("RUN_CANCELLED", 0), third: ("POSITION_GAP", 2), fourth: ("RUN_CANCELLED", 0)}
    driver.finish()
    assert driver.kinds(first) == ["answer"]
    driver.run(stream, Row(handle, [6], 2), outputs=EVERY)
    assert driver.reasons == []
    driver.end()


def test_a_stream_cannot_cancel_the_runs_of_another_one() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    (request,) = driver.run(one, Row(handle, [1], 0))
    driver.cancel(other, request)
    assert driver.said == []
    driver.end()


def test_a_withdrawn_session_leaves_the_queue_and_stands_at_its_end_when_it_is_ready_again() -> None:
    driver = Driver(max_batch=1)
    stream = driver.new_stream()
    a, b = driver.opened(stream, "a"), driver.opened(stream, "b")
    (request,) = driver.run(stream, Row(a, [1], 0))
    driver.run(stream, Row(b, [2], 0))
    queue = driver.engine.core.served[0].ready[Batch.SINGLES]
    assert len(queue) == 2
    driver.cancel(stream, request)
    assert len(queue) == 1
    driver.run(stream, Row(a, [3], 0))
    driver.begin()
    assert driver.ticks[0].rows.tolist() == [driver.plain_of("b").row]
    driver.end()


def test_a_session_can_be_queued_and_withdrawn_any_number_of_times_between_two_ticks() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    for _ in range(50):
        (request,) = driver.run(stream, Row(handle, [1], 0))
        driver.cancel(stream, request)
    driver.run(stream, Row(handle, [1], 0))
    assert driver.begin()
    driver.end()


def test_a_run_that_waited_longer_than_its_timeout_is_refused_and_what_waits_behind_it_goes_on() -> None:
    driver = Driver()
    stream = driver.new_stream()
    a, b = driver.opened(stream, "a"), driver.opened(stream, "b")
    late, behind = driver.run(stream, Row(a, [1], 0, timeout=1.0), Row(a, [2], 1))
    driver.run(stream, Row(b, [3], 0, timeout=3.0), outputs=EVERY)
    export = driver.export("a")
    driver.pass_time(2.0)
    driver.begin()
    assert {r.request: r.facts[0] for r in driver.said if r.kind == "failed"} == {
        late: "RUN_TIMED_OUT",
        behind: "POSITION_GAP",
    }
    assert driver.kinds(export) == ["exported"]
    assert driver.ticks[0].rows.tolist() == [driver.plain_of("b").row]
    driver.end()


def test_late_runs_do_not_keep_others_out_of_the_batch() -> None:
    driver = Driver(max_batch=2)
    stream = driver.new_stream()
    handles = [driver.opened(stream, name) for name in "abcde"]
    for place, handle in enumerate(handles):
        driver.run(stream, Row(handle, [1], 0, timeout=1.0 if place < 3 else 0.0))
    driver.pass_time(2.0)
    driver.begin()
    assert len(driver.ticks[0].rows) == 2
    driver.end()


def test_a_timeout_counts_only_until_the_first_token_has_run() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=1))
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    (request,) = driver.run(stream, Row(handle, [1, 2], 0, timeout=1.0))
    driver.begin()
    driver.pass_time(5.0)
    driver.finish()
    driver.begin()
    driver.finish()
    assert driver.kinds(request) == ["answer"]
    driver.end()


def test_a_stream_that_ends_withdraws_its_waiting_runs_and_leaves_its_sessions_open() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    driver.run(one, Row(handle, [1, 2], 0), Row(handle, [3], 2))
    driver.begin()
    export = driver.export("a")
    driver.end_stream(one)
    driver.finish()
    assert driver.kinds(export) == ["exported"]
    assert driver.plain_of("a").position == 2
    driver.opened(other, "a")
    driver.end()


def test_a_stream_that_ends_leaves_the_runs_that_somebody_else_has_joined() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1], 0), outputs=EVERY)
    joined = driver.run(UNARY, Row("a", [1], 0), outputs=EVERY)[0]
    driver.end_stream(stream)
    driver.begin()
    driver.finish()
    assert driver.kinds(joined) == ["answer"]
    driver.end()


def test_a_generate_of_a_stream_that_ends_is_broken_off() -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.opened(stream, "a")
    driver.generate("a", 100, stream=stream)
    driver.begin()
    driver.end_stream(stream)
    driver.finish()
    assert not driver.begin()
    driver.end()


def test_sessions_of_a_slow_reader_rest_until_it_reads_and_others_go_on() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=2))
    slow, other = driver.new_stream(), driver.new_stream()
    a, b = driver.opened(slow, "a"), driver.opened(other, "b")
    (request,) = driver.run(slow, Row(a, [1, 2, 3], 0))
    driver.run(other, Row(b, [4], 0))
    driver.begin()
    driver.begin()
    driver.pause(slow)
    driver.finish()
    driver.finish()
    assert not driver.begin()
    assert driver.engine.core.sessions.stage[driver.plain_of("a").row] == Stage.RESTING
    driver.run(other, Row(b, [5], 1))
    driver.settle()
    assert (driver.plain_of("a").position, driver.plain_of("b").position) == (2, 2)
    driver.pause(slow, paused=False)
    driver.begin()
    driver.finish()
    assert driver.kinds(request) == ["answer"]
    driver.end()


def test_resting_sessions_do_not_keep_others_out_of_the_batch() -> None:
    driver = Driver(max_batch=2)
    slow, other = driver.new_stream(), driver.new_stream()
    for stream, names in ((slow, "abc"), (other, "de")):
        for name in names:
            driver.run(stream, Row(driver.opened(stream, name), [1], 0))
    driver.pause(slow)
    driver.begin()
    assert len(driver.ticks[0].rows) == 2
    driver.end()


def test_a_new_holder_does_not_wait_for_the_slow_reader_before_it() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=1))
    slow, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(slow, "a")
    driver.run(slow, Row(handle, [1, 2, 3], 0))
    driver.begin()
    driver.pause(slow)
    driver.finish()
    assert not driver.begin()
    new_handle = driver.opened(other, "a")
    driver.run(other, Row(new_handle, [4], 3))
    driver.settle()
    assert driver.plain_of("a").position == 4
    driver.end()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_operation_of_somebody_else_does_not_wait_for_a_slow_reader(how: str) -> None:
    driver = Driver()
    slow = driver.new_stream()
    handle = driver.opened(slow, "a")
    driver.run(slow, Row(handle, [1, 2, 3], 0))
    driver.pause(slow)
    assert not driver.begin()
    (request,) = getattr(driver, how)(UNARY, "a")
    driver.begin()
    driver.finish()
    assert driver.kinds(request) == ["done"]
    driver.end()


def test_a_session_that_rests_is_closed_by_its_own_stream_when_that_reads_again() -> None:
    driver = Driver()
    slow = driver.new_stream()
    handle = driver.opened(slow, "a")
    driver.run(slow, Row(handle, [1, 2, 3], 0))
    driver.pause(slow)
    assert not driver.begin()
    (request,) = driver.close(slow, handle)
    assert not driver.begin()
    driver.pause(slow, paused=False)
    driver.begin()
    driver.finish()
    assert driver.kinds(request) == ["done"]
    driver.end()


def test_a_slow_reader_that_goes_away_lets_go_of_its_resting_sessions() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=1))
    slow = driver.new_stream()
    a, b = driver.opened(slow, "a"), driver.opened(slow, "b")
    driver.run(slow, Row(a, [1, 2], 0), Row(b, [3], 0), Row(b, [4], 1))
    driver.begin()
    driver.begin()
    driver.pause(slow)
    driver.finish()
    driver.finish()
    assert not driver.begin()
    export = driver.export("b")
    driver.end_stream(slow)
    driver.settle()
    assert (UNARY, export) not in driver.unanswered
    assert [driver.plain_of(name).position for name in "ab"] == [2, 1]
    driver.end()


def test_a_resting_run_that_is_handed_over_to_another_stream_runs() -> None:
    driver = Driver()
    slow = driver.new_stream()
    handle = driver.opened(slow, "a")
    (request,) = driver.run(slow, Row(handle, [1], 0))
    driver.pause(slow)
    assert not driver.begin()
    joined = driver.run(UNARY, Row("a", [1], 0))[0]
    driver.cancel(slow, request)
    assert driver.begin()
    driver.finish()
    assert driver.kinds(joined) == ["answer"]
    driver.end()


def test_a_generate_rests_while_its_caller_is_a_slow_reader_and_runs_of_others_do_not() -> None:
    driver = Driver()
    driver.open(UNARY, ["a", "b"], unary=True)
    driver.generate("a", 40)
    driver.run(UNARY, Row("b", [1, 2]))
    driver.pause(UNARY)
    driver.settle()
    assert [driver.plain_of(name).position for name in "ab"] == [0, 2]
    driver.run(UNARY, Row("a", [1]))
    assert driver.reasons == ["SESSION_BUSY"]
    driver.pause(UNARY, paused=False)
    driver.settle()
    assert driver.plain_of("a").position == 40
    driver.end()


def test_a_takeover_breaks_a_resting_generate_off() -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.open(UNARY, ["a"], unary=True)
    driver.generate("a", 40)
    driver.pause(UNARY)
    assert not driver.begin()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1], 0))
    assert driver.begin()
    driver.end()
