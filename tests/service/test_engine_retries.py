"""Exactly once: what becomes of a run that is sent again. The driver checks every answer against the plain sessions."""

import pytest

from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import NO_OUTPUTS, At, OutputSpec
from cellserve_service.replay import MAX_JOINED
from tests.service.driving import UNARY, Driver, Row

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)
LAST = OutputSpec(at=At.LAST, next_token=True)


class _Session:
    """Session "a" on a stream, having run tokens 1 2 3 and then 4 5."""

    def __init__(self, limits: EngineLimits | None = None) -> None:
        self.driver = Driver(limits)
        self.stream = self.driver.new_stream()
        self.handle = self.driver.opened(self.stream, "a")
        self.send([1, 2, 3], 0)
        self.driver.settle()
        self.send([4, 5], 3)
        self.driver.settle()
        self.state = self.driver.plain_of("a").state

    def send(self, tokens: list[int], position: int, outputs: OutputSpec = EVERY, **row: float) -> int:
        return self.driver.run(self.stream, Row(self.handle, tokens, position, **row), outputs=outputs)[0]  # type: ignore[arg-type]

    def has_not_moved(self) -> bool:
        self.driver.settle()
        plain = self.driver.plain_of("a")
        return plain.position == 5 and bool((plain.state == self.state).all())


def test_a_repeat_gets_the_held_answer_and_moves_nothing() -> None:
    session = _Session()
    for tokens, position in (([1, 2, 3], 0), ([4, 5], 3), ([1, 2, 3], 0)):
        request = session.send(tokens, position)
        assert session.driver.kinds(request) == ["answer"]
    assert session.has_not_moved()
    assert session.driver.statistics.runs_deduplicated == 3
    session.driver.end()


@pytest.mark.parametrize(
    ("tokens", "position", "outputs", "reason"),
    [
        ([1, 2, 4], 0, EVERY, "POSITION_CONFLICT"),
        ([5, 4], 3, EVERY, "POSITION_CONFLICT"),
        ([1, 2], 0, EVERY, "ANSWER_NOT_HELD"),
        ([2, 3], 1, EVERY, "ANSWER_NOT_HELD"),
        ([1, 2, 3, 4, 5], 0, EVERY, "ANSWER_NOT_HELD"),
        ([4, 5, 6], 3, EVERY, "POSITION_CONFLICT"),
        ([5, 6], 4, EVERY, "POSITION_CONFLICT"),
        ([6], 6, EVERY, "POSITION_GAP"),
        ([1, 2, 3], 0, LAST, "ANSWER_NOT_HELD"),
        ([1, 2, 3], 0, NO_OUTPUTS, "ANSWER_NOT_HELD"),
    ],
)
def test_what_is_no_repeat_is_refused_with_the_position(
    tokens: list[int], position: int, outputs: OutputSpec, reason: str
) -> None:
    session = _Session()
    session.send(tokens, position, outputs)
    assert session.driver.said[0].facts == (reason, 5)
    assert session.has_not_moved()
    assert not session.driver.statistics.runs_deduplicated
    session.driver.end()


def test_a_repeat_joins_the_run_while_it_waits_and_while_it_runs() -> None:
    session = _Session(EngineLimits(max_sessions=4, max_slice_tokens=2))
    driver = session.driver
    first = session.send([6, 0, 6], 5)
    waiting = session.send([6, 0, 6], 5)
    driver.begin()
    running = session.send([6, 0, 6], 5)
    driver.finish()
    driver.begin()
    driver.finish()
    assert [driver.kinds(request) for request in (first, waiting, running)] == [["answer"]] * 3
    assert driver.plain_of("a").position == 8
    driver.end()


def test_a_repeat_by_id_joins_the_run_of_another_stream() -> None:
    session = _Session()
    request = session.send([6], 5)
    joined = session.driver.run(UNARY, Row("a", [6], 5), outputs=EVERY)[0]
    session.driver.begin()
    session.driver.finish()
    assert session.driver.kinds(request) == session.driver.kinds(joined) == ["answer"]
    session.driver.end()


def test_a_repeat_in_the_same_command_joins_its_original() -> None:
    session = _Session()
    driver = session.driver
    rows = [Row(session.handle, [6, 6], 5), Row(session.handle, [1], 7), Row(session.handle, [6, 6], 5)]
    requests = driver.run(session.stream, *rows, outputs=EVERY)
    driver.begin()
    driver.finish()
    assert [driver.kinds(request) for request in requests] == [["answer"], [], ["answer"]]
    driver.end()
    assert not driver.unanswered


def test_only_so_many_repeats_wait_for_one_run() -> None:
    session = _Session()
    session.send([6], 5)
    for _ in range(MAX_JOINED):
        session.send([6], 5)
    session.send([6], 5)
    assert session.driver.reasons == ["QUEUE_FULL"]
    session.driver.end()


def test_a_run_that_somebody_has_joined_outlives_its_first_caller() -> None:
    session = _Session()
    driver = session.driver
    first, second = session.send([6], 5), session.send([6], 5)
    driver.cancel(session.stream, first)
    assert driver.kinds(first) == ["failed"]
    assert driver.kinds(second) == []
    driver.begin()
    driver.finish()
    assert driver.kinds(second) == ["answer"]
    driver.end()


def test_whoever_has_joined_a_run_can_leave_it_again() -> None:
    session = _Session()
    driver = session.driver
    first, second = session.send([6], 5), session.send([6], 5)
    driver.cancel(session.stream, second)
    assert driver.kinds(second) == ["failed"]
    driver.begin()
    driver.finish()
    assert driver.kinds(first) == ["answer"]
    driver.end()


def test_when_all_callers_of_a_run_are_gone_it_is_withdrawn() -> None:
    session = _Session()
    driver = session.driver
    requests = [session.send([6], 5), session.send([6], 5), session.send([6], 5)]
    driver.cancel(session.stream, *requests)
    assert driver.reasons == ["RUN_CANCELLED"] * 3
    assert session.has_not_moved()
    driver.end()


def test_the_timeout_of_a_run_is_that_of_whoever_wants_it_still() -> None:
    session = _Session()
    driver = session.driver
    first, second = session.send([6], 5, timeout=1.0), session.send([6], 5, timeout=9.0)
    driver.pass_time(2.0)
    driver.begin()
    assert driver.kinds(first) == ["failed"]
    assert driver.ticks
    driver.finish()
    assert driver.kinds(second) == ["answer"]
    driver.end()


def test_the_run_ids_of_withdrawn_runs_bring_no_repeats_along_when_they_are_used_again() -> None:
    session = _Session()
    driver = session.driver
    request, joined = session.send([6], 5), session.send([6], 5)
    driver.cancel(session.stream, request, joined)
    again = session.send([3], 5)
    driver.begin()
    driver.finish()
    assert [record.request for record in driver.said] == [again]
    driver.end()


def test_acknowledged_answers_are_held_no_more() -> None:
    session = _Session()
    driver = session.driver
    driver.acknowledge(session.stream, [session.handle, session.handle], [2, 4])
    session.send([1, 2, 3], 0)
    assert driver.reasons == ["ANSWER_NOT_HELD"]
    session.send([4, 5], 3)
    assert driver.reasons == []
    session.send([6], 5, acknowledged=5)
    driver.settle()
    session.send([4, 5], 3)
    assert driver.reasons == ["ANSWER_NOT_HELD"]
    driver.end()


def test_a_row_that_is_refused_still_acknowledges() -> None:
    session = _Session()
    session.send([9], 5, acknowledged=5)
    assert session.driver.reasons == ["INVALID_INPUT"]
    assert not session.driver.plain_of("a").held
    session.driver.end()


def test_the_oldest_answers_are_let_go_of_by_count_and_by_bytes() -> None:
    by_count = _Session(EngineLimits(max_sessions=4, max_held_answers=1))
    by_bytes = _Session(EngineLimits(max_sessions=4, max_held_answer_bytes=4 * 7 * 4))
    for session in (by_count, by_bytes):
        session.send([1, 2, 3], 0)
        assert session.driver.reasons == ["ANSWER_NOT_HELD"]
        session.send([4, 5], 3)
        assert session.driver.reasons == []
        session.driver.end()


def test_an_answer_that_is_too_large_is_not_held_but_a_changed_repeat_is_still_noticed() -> None:
    session = _Session(EngineLimits(max_sessions=4, max_held_answer_bytes=60))
    session.send([1, 2, 3], 0)
    assert session.driver.reasons == ["ANSWER_NOT_HELD"]
    session.send([1, 2, 6], 0)
    assert session.driver.reasons == ["POSITION_CONFLICT"]
    session.send([4, 5], 3)
    assert session.driver.reasons == []
    session.driver.end()


def test_a_held_answer_comes_again_in_slices_that_fit_a_message() -> None:
    session = _Session(EngineLimits(max_sessions=4, max_answer_bytes=60))
    session.send([1, 2, 3], 0)
    assert [record.facts[:3] for record in session.driver.said] == [(2, 2, 1), (3, 1, 0)]
    session.driver.end()


@pytest.mark.parametrize("outputs", [EVERY, OutputSpec(at=At.EVERY, states=True), LAST])
def test_an_answer_that_was_given_again_is_not_changed_by_what_is_held_after_it(outputs: OutputSpec) -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    for position in range(0, 40, 2):
        row = Row(handle, [position % 7, 3], position)
        driver.run(stream, row, outputs=outputs)
        driver.settle()
        driver.run(stream, row, outputs=outputs)
        driver.acknowledge(stream, [handle], [position + 2])
    driver.end()


def test_runs_without_outputs_are_repeated_too() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    asks_nothing = OutputSpec(at=At.EVERY)
    for outputs in (NO_OUTPUTS, asks_nothing, NO_OUTPUTS):
        driver.run(stream, Row(handle, [1, 2, 3], 0), outputs=outputs)
        driver.settle()
    assert driver.plain_of("a").position == 3
    assert driver.statistics.runs_deduplicated == 2
    driver.end()


def test_positions_count_anew_after_a_reset_that_waits() -> None:
    session = _Session()
    driver = session.driver
    session.send([6] * 3, 5)
    driver.begin()
    driver.reset(UNARY, "a")
    # The same tokens at the same position as before the reset: they have not run in this epoch.
    driver.run(UNARY, Row("a", [1, 2, 3], 0), outputs=EVERY)
    again = driver.run(UNARY, Row("a", [1, 2, 3], 0), outputs=EVERY)[0]
    assert driver.kinds(again) == []
    driver.run(UNARY, Row("a", [4, 5], 3), outputs=EVERY)
    driver.run(UNARY, Row("a", [6] * 3, 5), outputs=EVERY)
    driver.get("a")
    driver.settle()
    assert driver.plain_of("a").position == 8
    driver.end()


def test_after_an_import_what_ran_before_it_is_not_held() -> None:
    session = _Session()
    driver = session.driver
    driver.import_plain("a", position=7)
    driver.run(UNARY, Row("a", [4, 5], 3), outputs=EVERY)
    assert driver.reasons == ["ANSWER_NOT_HELD"]
    driver.run(UNARY, Row("a", [1], 7), outputs=EVERY)
    driver.settle()
    assert driver.plain_of("a").position == 8
    driver.end()


def test_a_new_holder_gets_the_answers_of_the_holder_before() -> None:
    session = _Session()
    driver = session.driver
    other = driver.new_stream()
    handle = driver.opened(other, "a")
    driver.run(other, Row(handle, [4, 5], 3), outputs=EVERY)
    assert [record.kind for record in driver.said] == ["answer"]
    driver.end()
