"""How it ends: drain, and expiry of idle sessions. The driver checks everything that is said."""

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputSpec
from tests.service.driving import UNARY, Driver, Row

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)


def test_a_drain_refuses_new_work_answers_repeats_and_finishes_what_was_accepted() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1, 2], 0), outputs=EVERY)
    driver.settle()
    driver.run(stream, Row(handle, [3, 4], 2), outputs=EVERY)
    driver.generate("a", 5)
    driver.drain(30.0)
    assert [record.facts for record in driver.said] == [(30.0,)]
    driver.run(stream, Row(handle, [1, 2], 0), outputs=EVERY)
    assert driver.reasons == ["SESSION_BUSY"]
    driver.settle()
    driver.run(stream, Row(handle, [3, 4], 2), outputs=EVERY)
    assert [record.kind for record in driver.said] == ["answer"]
    driver.run(stream, Row(handle, [5], 9))
    assert driver.reasons == ["DRAINING"]
    driver.generate("a", 5)
    assert driver.reasons == ["DRAINING"]
    driver.open(stream, ["b"])
    assert driver.reasons == ["DRAINING"]
    driver.fork("a", "c")
    assert driver.reasons == ["DRAINING"]
    driver.end()


def test_a_drain_is_done_when_runs_generates_and_waiting_operations_are() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.run(stream, Row(handle, [1, 2], 0))
    driver.begin()
    export = driver.export("a")
    driver.drain()
    assert not driver.is_drained
    driver.finish()
    assert driver.kinds(export) == ["exported"]
    assert driver.is_drained


def test_an_idle_engine_is_drained_at_once_and_says_so_once() -> None:
    driver = Driver()
    driver.drain()
    assert driver.is_drained
    driver.sweep()
    assert driver.num_drained == 1


def test_a_stream_that_begins_while_the_server_drains_is_told_so() -> None:
    driver = Driver()
    driver.drain(10.0)
    driver.pass_time(4.0)
    stream = driver.new_stream()
    assert [(record.stream, record.facts) for record in driver.said] == [(stream, (6.0,))]


def test_idle_sessions_expire_and_are_told_apart_from_those_that_never_were_for_a_while() -> None:
    driver = Driver(EngineLimits(max_sessions=4, idle_timeout_seconds=10, ended_session_memory_seconds=20))
    stream = driver.new_stream()
    a, b = driver.opened(stream, "a"), driver.opened(stream, "b")
    driver.pass_time(8.0)
    driver.run(stream, Row(a, [1], 0))
    driver.settle()
    driver.pass_time(4.0)
    driver.sweep()
    assert [record.facts for record in driver.said] == [("SESSION_EXPIRED",)]
    driver.run(stream, Row(b, [1], 0))
    assert driver.reasons == ["STALE_HANDLE"]
    driver.get("b")
    assert driver.reasons == ["SESSION_EXPIRED"]
    driver.pass_time(21.0)
    driver.sweep()
    driver.get("b")
    assert driver.reasons == ["SESSION_NOT_FOUND"]
    driver.get("a")
    assert driver.reasons == ["SESSION_EXPIRED"]
    assert driver.statistics.sessions_closed == {"SESSION_EXPIRED": 2}
    driver.end()


def test_sessions_with_something_to_do_do_not_expire_however_long_it_takes() -> None:
    driver = Driver(EngineLimits(max_sessions=4, idle_timeout_seconds=10))
    slow = driver.new_stream()
    handle = driver.opened(slow, "a")
    driver.run(slow, Row(handle, [1], 0))
    driver.pause(slow)
    driver.begin()
    driver.pass_time(1000.0)
    driver.sweep()
    assert driver.said == []
    driver.pause(slow, paused=False)
    driver.begin()
    driver.pass_time(1000.0)
    driver.sweep()
    driver.finish()
    driver.sweep()
    assert "a" in driver.plain.sessions
    driver.end()


def test_the_slots_of_ended_sessions_are_given_to_others_who_see_nothing_of_them() -> None:
    driver = Driver(EngineLimits(max_sessions=3, idle_timeout_seconds=10), num_slots=1)
    stream = driver.new_stream()
    for name in "abcdef":
        handle = driver.opened(stream, name)
        driver.run(stream, Row(handle, [1, 2, 3], 0), outputs=EVERY)
        driver.settle()
        driver.pass_time(6.0)
        driver.sweep()
    driver.end()


def test_a_full_server_that_may_evict_ends_the_longest_idle_session_and_tells_its_holder() -> None:
    driver = Driver(EngineLimits(max_sessions=3, evict_when_full=True))
    stream = driver.new_stream()
    handles = {}
    for name in "abc":
        handles[name] = driver.opened(stream, name)
        driver.pass_time(1.0)
    driver.run(stream, Row(handles["a"], [1], 0))
    driver.settle()
    driver.pass_time(1.0)
    driver.open(stream, ["d"])
    assert [record.facts for record in driver.said if record.kind == "ended"] == [("SESSION_EVICTED",)]
    driver.run(stream, Row(handles["b"], [1], 0))
    assert driver.reasons == ["STALE_HANDLE"]
    driver.get("b")
    assert driver.reasons == ["SESSION_EVICTED"]
    assert driver.statistics.sessions_closed == {"SESSION_EVICTED": 1}
    driver.end()


def test_what_is_asked_for_and_what_has_something_to_do_is_not_evicted() -> None:
    driver = Driver(EngineLimits(max_sessions=3, evict_when_full=True))
    stream = driver.new_stream()
    a, _, c = (driver.opened(stream, name) for name in "abc")
    driver.run(stream, Row(a, [1], 0))
    driver.run(stream, Row(c, [1], 0))
    driver.open(stream, ["b", "d"])
    assert driver.reasons == ["SESSION_LIMIT"]
    assert set(driver.plain.sessions) == {"a", "b", "c"}
    driver.fork("b", "e")
    assert driver.reasons == ["SESSION_LIMIT"]
    driver.settle()
    driver.fork("b", "e")
    assert set(driver.plain.sessions) == {"b", "c", "e"}
    driver.end()


def test_an_operator_evicts_a_session_and_its_holder_is_told_so() -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.opened(stream, "a")
    driver.close(UNARY, "a", evicts=True)
    assert [record.facts for record in driver.said if record.kind == "ended"] == [("SESSION_EVICTED",)]
    driver.get("a")
    assert driver.reasons == ["SESSION_EVICTED"]
    driver.end()
