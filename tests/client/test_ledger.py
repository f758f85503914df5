"""Positions of a session through answers, failures, withdrawals and lost connections."""

import asyncio
from array import array

import pytest

from cellserve._ledger import Ledger
from cellserve.errors import (
    InvalidInput,
    PositionConflict,
    PositionGap,
    QueueFull,
    RunCancelled,
    SessionMoved,
)


@pytest.fixture
def ledger() -> Ledger:
    """Attached, at position 10."""
    ledger = Ledger("a")
    ledger.attach(handle=1, epoch=3, position=10)
    return ledger


def test_a_new_session_stands_where_the_server_says(ledger: Ledger) -> None:
    assert (ledger.position, ledger.next_position, ledger.epoch, ledger.handle) == (10, 10, 3, 1)
    assert ledger.ready


def test_runs_follow_each_other_without_waiting_for_answers(ledger: Ledger) -> None:
    assert [ledger.reserve(3, 4), ledger.reserve(1, 4), ledger.reserve(2, 4)] == [10, 13, 14]
    assert ledger.position == 10
    ledger.answered(13, 7, 4)
    assert (ledger.position, ledger.next_position, ledger.num_unanswered) == (13, 16, 2)
    assert ledger.ready


def test_after_a_refusal_nothing_is_sent_until_the_runs_behind_it_have_failed_too(ledger: Ledger) -> None:
    for count in (1, 2, 3):
        ledger.reserve(count, 4)
    ledger.answered(11, 7, 4)
    ledger.failed(InvalidInput("no"), 4)
    assert not ledger.ready
    ledger.failed(PositionGap("gap", position=11), 4)
    assert ledger.ready
    assert (ledger.position, ledger.reserve(1, 4)) == (11, 11)


def test_a_refusal_that_moved_nothing_leaves_the_position(ledger: Ledger) -> None:
    ledger.reserve(4, 4)
    ledger.failed(QueueFull("later"), 4)
    assert (ledger.position, ledger.next_position, ledger.ready) == (10, 10, True)


@pytest.mark.parametrize("error", [PositionGap("gap", position=4), PositionConflict("other tokens", position=25)])
def test_the_position_of_a_failure_is_taken_over(ledger: Ledger, error: PositionGap | PositionConflict) -> None:
    ledger.reserve(1, 4)
    ledger.failed(error, 4)
    assert ledger.position == ledger.next_position == error.position


def test_an_answer_behind_a_failure_counts_more_than_the_failures_position(ledger: Ledger) -> None:
    ledger.reserve(1, 4)
    ledger.reserve(1, 4)
    ledger.failed(PositionGap("gap", position=10), 4)
    ledger.answered(11, 7, 4)
    assert (ledger.position, ledger.next_position, ledger.ready) == (11, 11, True)


def test_a_run_given_up_that_finishes_moves_the_position(ledger: Ledger) -> None:
    ledger.reserve(2, 4)
    ledger.give_up()
    assert not ledger.ready
    ledger.answered(12, 7, 4)
    assert (ledger.position, ledger.next_position, ledger.ready) == (12, 12, True)


def test_a_run_given_up_that_is_withdrawn_leaves_the_position(ledger: Ledger) -> None:
    ledger.reserve(2, 4)
    ledger.give_up()
    ledger.failed(RunCancelled("withdrawn"), 4)
    assert (ledger.position, ledger.next_position, ledger.ready) == (10, 10, True)


def test_attaching_again_leaves_the_position_where_the_answers_have_brought_it(ledger: Ledger) -> None:
    ledger.detach()
    assert not ledger.ready
    ledger.attach(handle=2, epoch=4, position=12)
    assert ledger.ready
    assert (ledger.position, ledger.next_position) == (10, 10)


def test_where_the_position_is_not_known_attaching_again_tells_it(ledger: Ledger) -> None:
    ledger.detach()
    ledger.adopts_position = True  # as after an import whose outcome is in doubt
    ledger.attach(handle=2, epoch=4, position=12)
    assert (ledger.position, ledger.next_position, ledger.adopts_position) == (12, 12, False)


def test_a_session_that_is_lost_is_never_ready_again(ledger: Ledger) -> None:
    ledger.reserve(1, 4)
    ledger.failed(SessionMoved("elsewhere"), 4)
    assert ledger.lost_reason == "SESSION_MOVED"
    assert ledger.handle is None
    assert not ledger.ready


def test_nothing_is_sent_past_those_who_wait_their_turn(ledger: Ledger) -> None:
    ledger.num_waiting += 1
    ledger.update()
    assert not ledger.ready
    ledger.num_waiting -= 1
    ledger.update()
    assert ledger.ready


async def test_who_waits_for_changes_is_woken_by_answers_and_by_losses(ledger: Ledger) -> None:
    ledger.reserve(1, 4)
    waiting = asyncio.create_task(ledger.changes())
    await asyncio.sleep(0)
    ledger.answered(11, 7, 4)
    await waiting
    waiting = asyncio.create_task(ledger.changes())
    await asyncio.sleep(0)
    ledger.lose("SESSION_EXPIRED")
    await waiting


def test_a_session_without_durability_keeps_nothing(ledger: Ledger) -> None:
    ledger.keep("none", 5, vectors=False)
    ledger.reserve(1, 4)
    ledger.answered(11, 7, 4)
    assert ledger.kept is None
    assert ledger.kept_limit > 10**9


def test_the_tokens_of_answers_are_kept_until_they_are_durable(ledger: Ledger) -> None:
    ledger.keep("periodic", 5, vectors=False)
    ledger.reserve(2, 4)
    ledger.reserve(1, 4)
    assert ledger.kept_limit == 15
    ledger.answered(12, array("I", [1, 2]), 4)
    ledger.answered(13, 3, 4)
    ledger.consumed(array("I", [4, 5]), 15)
    assert ledger.kept is not None
    assert (ledger.kept.start, ledger.kept.end) == (10, 15)
    assert ledger.kept.cut(11, 14) == array("I", [2, 3, 4])
    ledger.is_durable_at(12)
    assert (ledger.durable_position, ledger.kept.start, ledger.kept_limit) == (12, 12, 17)
    ledger.stand_at(0)
    assert (ledger.kept.start, ledger.kept.end, ledger.kept_limit) == (0, 0, 5)


async def test_who_waits_for_room_is_woken_by_a_durable_notice(ledger: Ledger) -> None:
    ledger.keep("periodic", 5, vectors=False)
    waiting = asyncio.create_task(ledger.changes())
    await asyncio.sleep(0)
    ledger.is_durable_at(10)
    await waiting
