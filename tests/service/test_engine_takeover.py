"""One writer at a time: opening, attaching, taking over. The driver checks everything that is said."""

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import InitialState
from cellserve_service.outputs import At, OutputSpec
from tests.service.driving import TOKENS, UNARY, Driver, Row
from tests.service.records import flat_records

EVERY = OutputSpec(at=At.EVERY, next_token=True, states=True)
ATTACH, CREATE = OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_CREATE
DEFAULT = Durability.DURABILITY_UNSPECIFIED


def test_open_tells_whether_it_created_or_attached_and_where_the_session_stands() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    assert driver.said[0].facts == ("a", 0, 1, True)
    driver.run(one, Row(handle, [1, 2, 3], 0))
    driver.begin()
    driver.open(other, ["a", "b"])
    told = {record.facts[0]: record.facts[1:] for record in driver.said if record.kind == "opened"}
    assert told == {"a": (3, 2, False), "b": (0, 1, True)}
    driver.end()


@pytest.mark.parametrize(
    ("mode", "session_id", "reason"),
    [
        (ATTACH, "new", "SESSION_NOT_FOUND"),
        (ATTACH, "closed", "SESSION_CLOSED"),
        (CREATE, "there", "SESSION_EXISTS"),
        (CREATE, "no id", "INVALID_INPUT"),
        (CREATE, "", "INVALID_INPUT"),
        (CREATE, "x" * 129, "INVALID_INPUT"),
        (CREATE, "ümlaut", "INVALID_INPUT"),
    ],
)
def test_an_id_that_does_not_fit_the_mode_is_refused(mode: OpenMode.ValueType, session_id: str, reason: str) -> None:
    driver = Driver()
    driver.open(UNARY, ["there", "closed"], unary=True)
    driver.close(UNARY, "closed")
    if reason == "INVALID_INPUT":
        stream = driver.new_stream()
        command = messages.OpenSessions(stream, np.array([9], np.uint64), "fake", [session_id], mode, DEFAULT, None)
        driver.engine.handle(command, 0.0)
        assert flat_records(driver.engine.take_events())[0][0].facts[0] == reason
    else:
        driver.open(driver.new_stream(), [session_id], mode=mode)
        assert driver.reasons == [reason]
        driver.end()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"mode": 77}, "INVALID_INPUT"),
        ({"durability": 77}, "INVALID_INPUT"),
        ({"durability": 2}, "NO_STORE"),
        ({"durability": 3}, "NO_STORE"),
        ({"model": "nobody"}, "MODEL_NOT_FOUND"),
    ],
)
def test_a_command_that_asks_for_what_there_is_not_opens_nothing(columns: dict[str, object], reason: str) -> None:
    driver = Driver()
    command = {"stream": 5, "requests": np.array([1, 2], np.uint64), "model": "fake", "session_ids": ["a", "b"]}
    command |= {"mode": 0, "durability": 0, "states": None} | columns
    driver.engine.handle(messages.OpenSessions(**command), 0.0)  # type: ignore[arg-type]
    assert [record.facts[0] for record, _ in flat_records(driver.engine.take_events())] == [reason] * 2
    assert not driver.engine.core.sessions.row_by_id


def test_rows_succeed_or_fail_one_by_one_on_a_stream_and_all_or_none_in_a_unary_call() -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.open(UNARY, ["there"], model="vectors", unary=True)
    driver.open(stream, ["a", "there", "b", "a"])
    assert sorted(record.kind for record in driver.said) == ["failed", "failed", "opened", "opened"]
    driver.open(UNARY, ["c", "there"], unary=True)
    assert driver.reasons == ["SESSION_EXISTS"]
    assert "c" not in driver.plain.sessions
    driver.end()


def test_opens_beyond_the_limit_are_refused_at_once_and_a_close_makes_room() -> None:
    driver = Driver(EngineLimits(max_sessions=2))
    stream = driver.new_stream()
    driver.open(stream, ["a", "b", "c", "d"])
    assert driver.reasons == ["SESSION_LIMIT"] * 2
    driver.open(stream, ["b", "c"])
    assert driver.reasons == ["SESSION_LIMIT"]
    driver.close(UNARY, "a")
    driver.open(stream, ["c"])
    assert driver.reasons == []
    driver.end()


def test_the_server_makes_ids_where_none_are_given() -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.open(stream, None, count=3)
    driver.open(UNARY, None, count=2, unary=True)
    assert len(driver.plain.sessions) == 5
    driver.end()


def test_a_session_begins_with_the_state_that_it_is_given() -> None:
    driver = Driver()
    stream = driver.new_stream()
    state = InitialState(TOKENS.fingerprint, 40, np.full((2, 3), 17, np.float32))
    handle = driver.opened(stream, "a", states=[state])
    driver.run(stream, Row(handle, [1, 2], 40), outputs=EVERY)
    driver.settle()
    driver.open(stream, ["a"], states=[state])
    assert driver.reasons == ["SESSION_EXISTS"]
    driver.end()


@pytest.mark.parametrize(
    "state",
    [
        InitialState(b"other", 1, np.zeros((2, 3), np.float32)),
        InitialState(TOKENS.fingerprint, 1, np.zeros((2, 4), np.float32)),
        InitialState(TOKENS.fingerprint, 1, np.zeros((3, 2), np.float32)),
        InitialState(TOKENS.fingerprint, 1, np.full((2, 3), np.nan, np.float32)),
    ],
)
def test_a_state_that_does_not_fit_the_model_is_refused(state: InitialState) -> None:
    driver = Driver()
    stream = driver.new_stream()
    driver.opened(stream, "a")
    opening = messages.OpenSessions(stream, np.array([90], np.uint64), "fake", ["b"], CREATE, DEFAULT, [state])
    target = messages.SessionTarget(UNARY, np.array([91], np.uint64), session_ids=["a"])
    for command in (opening, messages.ImportSession(target, state)):
        driver.engine.handle(command, 0.0)
        assert flat_records(driver.engine.take_events())[0][0].facts[0] == "STATE_MISMATCH"
    driver.end()


def test_a_takeover_withdraws_what_waits_and_lets_what_runs_finish() -> None:
    driver = Driver(EngineLimits(max_sessions=4, max_slice_tokens=2))
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    first, second = driver.run(one, Row(handle, [1, 2, 3], 0), Row(handle, [4], 3), outputs=EVERY)
    driver.begin()
    new_handle = driver.opened(other, "a")
    assert driver.kinds(second) == ["failed"]
    assert sorted(driver.reasons) == ["SESSION_MOVED"]
    # The run that has begun counts: the new holder goes on behind it.
    assert next(record.facts for record in driver.said if record.kind == "opened") == ("a", 3, 2, False)
    driver.run(one, Row(handle, [5], 3))
    assert driver.reasons == ["SESSION_MOVED"]
    driver.run(other, Row(new_handle, [6], 3), outputs=EVERY)
    driver.finish()
    driver.begin()
    driver.finish()
    assert driver.kinds(first) == ["answer"]
    driver.settle()
    driver.end()


def test_the_loser_is_told_at_once_and_can_take_the_session_back() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    first = driver.opened(one, "a")
    second = driver.opened(other, "a")
    assert [record.facts for record in driver.said if record.kind == "ended"] == [("SESSION_MOVED",)]
    third = driver.opened(one, "a")
    for stream, handle, reason in ((one, first, "SESSION_MOVED"), (other, second, "SESSION_MOVED")):
        driver.run(stream, Row(handle, [1], 0))
        assert driver.reasons == [reason]
    driver.run(one, Row(third, [1], 0))
    assert driver.reasons == []
    driver.end()


def test_to_attach_again_on_the_same_stream_makes_the_old_handle_stale_but_is_no_move() -> None:
    driver = Driver()
    stream = driver.new_stream()
    first = driver.opened(stream, "a")
    waiting, by_id = driver.run(stream, Row(first, [1], 0))[0], driver.run(UNARY, Row("a", [2], 1))[0]
    second = driver.opened(stream, "a")
    refused = {record.request: record.facts[0] for record in driver.said if record.kind == "failed"}
    assert refused == {waiting: "STALE_HANDLE", by_id: "SESSION_MOVED"}
    assert not [record for record in driver.said if record.kind == "ended"]
    driver.run(stream, Row(first, [1], 0))
    assert driver.reasons == ["STALE_HANDLE"]
    driver.run(stream, Row(second, [1], 0))
    driver.end()


def test_a_handle_of_another_stream_is_worth_nothing() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    driver.run(other, Row(handle, [1], 0))
    driver.reset(other, handle)
    driver.close(other, handle)
    driver.acknowledge(other, [handle], [5])
    assert driver.plain_of("a").position == 0
    driver.end()


def test_what_an_earlier_holder_has_queued_behind_an_operation_is_withdrawn_too() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    driver.run(one, Row(handle, [1, 2], 0))
    driver.begin()
    export = driver.export("a")
    behind = driver.run(one, Row(handle, [3], 2))[0]
    new_handle = driver.opened(other, "a")
    assert driver.kinds(behind) == ["failed"]
    driver.run(one, Row(handle, [4], 2))
    assert driver.reasons == ["SESSION_MOVED"]
    driver.run(other, Row(new_handle, [5], 2), outputs=EVERY)
    driver.finish()
    assert driver.kinds(export) == ["exported"]
    driver.settle()
    assert driver.plain_of("a").position == 3
    driver.end()


def test_a_withdrawal_by_takeover_lets_the_operations_behind_it_go_on_at_once() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    driver.run(one, Row(handle, [1, 2], 0))
    export = driver.export("a")
    reset = driver.reset(UNARY, "a")[0]
    driver.open(other, ["a"])
    assert driver.kinds(export) == ["exported"]
    assert driver.kinds(reset) == ["done"]
    assert driver.plain_of("a").position == 0
    driver.end()


def test_a_session_whose_reset_still_waits_is_attached_where_it_will_stand() -> None:
    driver = Driver()
    one, other = driver.new_stream(), driver.new_stream()
    handle = driver.opened(one, "a")
    driver.run(one, Row(handle, [1, 2], 0))
    driver.begin()
    reset = driver.reset(one, handle)[0]
    new_handle = driver.opened(other, "a")
    assert next(record.facts for record in driver.said if record.kind == "opened") == ("a", 0, 3, False)
    driver.run(other, Row(new_handle, [6], 0), outputs=EVERY)
    driver.finish()
    # The reset is done in the epoch in which it was asked for: its handle has moved away since.
    assert next(record.facts for record in driver.said if record.request == reset) == (2, 0, False)
    driver.settle()
    assert driver.plain_of("a").position == 1
    driver.end()


def test_a_unary_open_takes_the_session_from_its_stream_and_leaves_it_to_nobody() -> None:
    driver = Driver()
    stream = driver.new_stream()
    handle = driver.opened(stream, "a")
    driver.open(UNARY, ["a"], unary=True)
    driver.run(stream, Row(handle, [1], 0))
    assert driver.reasons == ["SESSION_MOVED"]
    driver.get("a")
    driver.end()


def test_a_row_used_again_for_another_model_begins_with_nothing_of_the_session_before() -> None:
    driver = Driver(EngineLimits(max_sessions=1))
    stream = driver.new_stream()
    for model, tokens in (("fake", [1, 2]), ("vectors", [(1.0, 2.0)]), ("fake", [3])):
        handle = driver.opened(stream, "a", model=model)
        driver.run(stream, Row(handle, tokens, 0), outputs=OutputSpec(at=At.EVERY, states=True))
        assert sum(len(queue) for queue in driver.engine.core.served[model == "vectors"].ready) == 1
        driver.end_stream(stream)
        stream = driver.new_stream()
        driver.close(UNARY, "a")
    handle = driver.opened(stream, "a", model="vectors")
    driver.run(stream, Row(handle, [(1.0, 2.0)], 0), outputs=OutputSpec(at=At.EVERY, states=True))
    driver.settle()
    driver.end()
