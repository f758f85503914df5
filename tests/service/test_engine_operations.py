"""Reset, import, export, fork and close: each waits for the runs before it. The driver checks all that is said."""

import numpy as np
import pytest

from cellserve_service import messages
from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import At, OutputSpec
from tests.service.driving import UNARY, Driver, Row
from tests.service.records import flat_records

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)


class _Session:
    """Session "a" on a stream, with a run of three tokens in a tick and one of two behind it."""

    def __init__(self, limits: EngineLimits | None = None) -> None:
        self.driver = Driver(limits)
        self.stream = self.driver.new_stream()
        self.handle = self.driver.opened(self.stream, "a")
        self.first, self.second = self.driver.run(
            self.stream, Row(self.handle, [1, 2, 3], 0), Row(self.handle, [4, 5], 3), outputs=EVERY
        )
        self.driver.begin()

    def kinds(self, request: int) -> list[str]:
        """What a request is told when the tick in hand, and then one more, is over."""
        self.driver.finish()
        assert self.driver.kinds(request) == []
        self.driver.begin()
        self.driver.finish()
        return self.driver.kinds(request)


def test_an_export_waits_for_the_runs_that_were_accepted_before_it() -> None:
    session = _Session()
    request = session.driver.export("a")
    assert session.kinds(request) == ["exported"]
    session.driver.end()


def test_an_export_of_an_idle_session_is_answered_at_once() -> None:
    driver = Driver()
    driver.open(UNARY, ["a"], unary=True)
    assert driver.kinds(driver.export("a")) == ["exported"]
    driver.end()


def test_a_state_goes_through_export_and_import_and_runs_on_alike() -> None:
    session = _Session()
    driver = session.driver
    driver.settle()
    driver.export("a")
    fingerprint, position, values = driver.said[0].facts
    assert isinstance(values, bytes)
    state = messages.InitialState(fingerprint, position, np.frombuffer(values, np.float32).reshape(2, 3))  # type: ignore[arg-type]
    driver.open(UNARY, ["b"], unary=True, states=[state])
    driver.run(UNARY, Row("a", [6, 6], 5), outputs=EVERY)
    driver.run(UNARY, Row("b", [6, 6], 5), outputs=EVERY)
    driver.settle()
    assert (driver.plain_of("a").state == driver.plain_of("b").state).all()
    driver.end()


def test_a_reset_waits_and_tells_the_new_handle_when_it_is_done() -> None:
    session = _Session()
    driver = session.driver
    (request,) = driver.reset(session.stream, session.handle)
    driver.run(session.stream, Row(session.handle, [6], 5))
    assert driver.reasons == ["STALE_HANDLE"]
    assert session.kinds(request) == ["done"]
    grip = driver.plain_of("a").grip
    assert grip is not None
    assert grip.handle is not None
    driver.run(session.stream, Row(grip.handle, [6], 0), outputs=EVERY)
    driver.settle()
    driver.end()


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_a_handle_that_stands_twice_in_a_command_is_stale_the_second_time(kind: str) -> None:
    driver = Driver()
    stream = driver.new_stream()
    a, b = driver.opened(stream, "a"), driver.opened(stream, "b")
    getattr(driver, kind)(stream, a, b, a, b)
    assert driver.reasons == ["STALE_HANDLE"] * 2
    driver.end()


def test_a_reset_by_id_makes_the_handle_of_its_holder_stale_and_tells_it() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.reset(UNARY, "a")
    assert [record.facts for record in driver.said if record.kind == "ended"] == [("STALE_HANDLE",)]
    driver.run(stream, Row(handle, [1], 0))
    assert driver.reasons == ["STALE_HANDLE"]
    driver.end()


def test_runs_accepted_behind_a_waiting_reset_begin_at_zero() -> None:
    session = _Session()
    driver = session.driver
    driver.reset(UNARY, "a")
    driver.run(UNARY, Row("a", [6, 6], 0), outputs=EVERY)
    driver.export("a")
    driver.settle()
    assert driver.plain_of("a").position == 2
    driver.end()


def test_withdrawing_a_run_before_a_waiting_reset_leaves_the_runs_behind_it_alone() -> None:
    session = _Session()
    driver = session.driver
    driver.reset(UNARY, "a")
    behind = driver.run(UNARY, Row("a", [6, 6], 0), outputs=EVERY)[0]
    driver.cancel(session.stream, session.second)
    assert driver.kinds(session.second) == ["failed"]
    assert driver.kinds(behind) == []
    driver.settle()
    assert driver.plain_of("a").position == 2
    driver.end()


def test_tokens_wait_per_session_whatever_position_an_import_has_set() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_session_pending_tokens=6))
    driver.open(UNARY, ["a"], unary=True)
    driver.run(UNARY, Row("a", [1, 2, 3], 0))
    driver.begin()
    driver.import_plain("a", position=1000)
    driver.run(UNARY, Row("a", [4, 5, 6], 1000))
    assert driver.reasons == []
    driver.run(UNARY, Row("a", [4], 1003))
    assert driver.reasons == ["QUEUE_FULL"]
    driver.get("a")
    driver.settle()
    assert driver.plain_of("a").position == 1003
    driver.end()


def test_a_fork_is_an_independent_copy_held_by_nobody() -> None:
    session = _Session()
    driver = session.driver
    request = driver.fork("a", "b")
    assert session.kinds(request) == ["forked"]
    driver.run(UNARY, Row("b", [1], 5), outputs=EVERY)
    driver.run(session.stream, Row(session.handle, [2], 5), outputs=EVERY)
    driver.settle()
    assert (driver.plain_of("a").state != driver.plain_of("b").state).any()
    driver.end()


def test_a_fork_needs_a_free_id_and_room() -> None:
    driver = Driver(EngineLimits(max_sessions=2))
    driver.open(UNARY, ["a"], unary=True)
    driver.fork("a", "a")
    assert driver.reasons == ["SESSION_EXISTS"]
    driver.fork("a", "b")
    driver.fork("a", "c")
    assert driver.reasons == ["SESSION_LIMIT"]
    assert driver.statistics.sessions_rejected == {"SESSION_EXISTS": 1, "SESSION_LIMIT": 1}
    driver.end()


def test_a_close_waits_for_accepted_runs_but_ends_the_session_for_everybody_at_once() -> None:
    session = _Session()
    driver = session.driver
    (request,) = driver.close(session.stream, session.handle)
    driver.run(session.stream, Row(session.handle, [6], 5))
    driver.run(UNARY, Row("a", [6], 5))
    driver.export("a")
    assert driver.reasons == ["SESSION_CLOSED"]
    assert session.kinds(request) == ["done"]
    driver.end()


def test_the_id_of_a_session_that_is_closing_can_be_created_again_at_once() -> None:
    session = _Session()
    driver = session.driver
    driver.close(UNARY, "a")
    assert [record.facts for record in driver.said if record.kind == "ended"] == [("SESSION_CLOSED",)]
    handle = driver.opened(session.stream, "a")
    driver.run(session.stream, Row(handle, [6], 0), outputs=EVERY)
    driver.settle()
    assert driver.plain_of("a").position == 1
    driver.end()


def test_a_close_comes_after_the_operations_that_waited_before_it() -> None:
    session = _Session()
    driver = session.driver
    export, fork = driver.export("a"), driver.fork("a", "b")
    reset = driver.reset(UNARY, "a")[0]
    (close,) = driver.close(UNARY, "a")
    driver.settle()
    assert not driver.unanswered
    assert driver.plain_of("b").position == 5
    assert export < fork < reset < close
    driver.end()


def test_thousands_of_operations_can_wait_on_a_session_and_no_more_than_its_tokens() -> None:
    driver = Driver(EngineLimits(max_sessions=2, max_session_pending_tokens=3000, max_held_answers=1))
    driver.open(UNARY, ["a"], unary=True)
    driver.run(UNARY, Row("a", [1]))
    driver.begin()
    target = messages.SessionTarget(UNARY, np.arange(1, 4001, dtype=np.uint64), session_ids=["a"] * 4000)
    driver.engine.handle(messages.ExportSession(target), 0.0)
    assert len(driver.engine.take_events()) == 4000 - 2999
    tick = driver.ticks.popleft()
    driver.engine.finish_tick(tick, driver.engine.collect(tick), 0.0)
    kinds = [record.kind for record, _ in flat_records(driver.engine.take_events())]
    assert kinds.count("exported") == 2999


def test_operations_on_a_session_under_a_generate_are_refused_but_a_close_breaks_it_off() -> None:
    driver = Driver()
    driver.open(UNARY, ["a"], unary=True)
    generate = driver.generate("a", 1000)
    driver.begin()
    driver.reset(UNARY, "a")
    assert driver.reasons == ["SESSION_BUSY"]
    driver.export("a")
    assert driver.reasons == ["SESSION_BUSY"]
    driver.fork("a", "b")
    assert driver.reasons == ["SESSION_BUSY"]
    driver.import_plain("a", 3)
    assert driver.reasons == ["SESSION_BUSY"]
    (close,) = driver.close(UNARY, "a")
    driver.finish()
    assert driver.kinds(generate) == ["failed", "generated"]
    assert driver.kinds(close) == ["done"]
    driver.end()


def test_listing_goes_page_by_page_in_the_order_of_ids() -> None:
    driver = Driver()
    driver.open(UNARY, ["b", "d", "a"], unary=True)
    driver.open(UNARY, ["c"], model="vectors", unary=True)
    driver.list_page(page_size=3)
    assert [facts[0] for facts in driver.said[0].facts[0]] == ["a", "b", "c"]  # type: ignore[attr-defined]
    assert driver.said[0].facts[1:] == (4, True)
    driver.list_page(after="c", page_size=3)
    driver.list_page(model="vectors")
    assert driver.said[0].facts[1:] == (1, False)
    driver.end()
