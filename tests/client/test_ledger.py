"""Positions of a session through answers, failures, withdrawals and lost connections."""

import asyncio

import pytest

from cellserve._ledger import Ledger
from cellserve.errors import (
    ConnectionLost,
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
    assert [ledger.reserve(3), ledger.reserve(1), ledger.reserve(2)] == [10, 13, 14]
    assert ledger.position == 10
    ledger.answered(13)
    assert (ledger.position, ledger.next_position, ledger.num_unanswered) == (13, 16, 2)
    assert ledger.ready


def test_after_a_refusal_nothing_is_sent_until_the_runs_behind_it_have_failed_too(ledger: Ledger) -> None:
    for count in (1, 2, 3):
        ledger.reserve(count)
    ledger.answered(11)
    ledger.failed(InvalidInput("no"), given_up=False)
    assert not ledger.ready
    ledger.failed(PositionGap("gap", position=11), given_up=False)
    assert ledger.ready
    assert (ledger.position, ledger.reserve(1)) == (11, 11)


def test_a_refusal_that_moved_nothing_leaves_the_position(ledger: Ledger) -> None:
    ledger.reserve(4)
    ledger.failed(QueueFull("later"), given_up=False)
    assert (ledger.position, ledger.next_position, ledger.ready) == (10, 10, True)


@pytest.mark.parametrize("error", [PositionGap("gap", position=4), PositionConflict("other tokens", position=25)])
def test_the_position_of_a_failure_is_taken_over(ledger: Ledger, error: PositionGap | PositionConflict) -> None:
    ledger.reserve(1)
    ledger.failed(error, given_up=False)
    assert ledger.position == ledger.next_position == error.position


def test_an_answer_behind_a_failure_counts_more_than_the_failures_position(ledger: Ledger) -> None:
    ledger.reserve(1)
    ledger.reserve(1)
    ledger.failed(PositionGap("gap", position=10), given_up=False)
    ledger.answered(11)
    assert (ledger.position, ledger.next_position, ledger.ready) == (11, 11, True)


def test_a_run_given_up_that_finishes_moves_the_position(ledger: Ledger) -> None:
    ledger.reserve(2)
    ledger.give_up()
    assert not ledger.ready
    ledger.answered(12)
    assert (ledger.position, ledger.next_position, ledger.ready) == (12, 12, True)


def test_a_run_given_up_that_is_withdrawn_leaves_the_position(ledger: Ledger) -> None:
    ledger.reserve(2)
    ledger.give_up()
    ledger.failed(RunCancelled("withdrawn"), given_up=True)
    assert (ledger.position, ledger.next_position, ledger.ready) == (10, 10, True)


def test_a_run_that_is_repeated_after_a_lost_connection_has_its_old_position(ledger: Ledger) -> None:
    ledger.reserve(2)
    ledger.failed(ConnectionLost("gone", in_doubt=True), given_up=False)
    ledger.detach()
    assert not ledger.ready
    ledger.attach(handle=2, epoch=4, position=12)  # it had run: the repeat gets the answer that is held
    assert ledger.ready
    assert (ledger.position, ledger.reserve(2)) == (10, 10)


def test_after_a_lost_connection_that_nobody_was_told_of_the_servers_word_counts(ledger: Ledger) -> None:
    ledger.reserve(2)
    ledger.give_up()
    ledger.failed(ConnectionLost("gone", in_doubt=True), given_up=True)
    ledger.detach()
    ledger.attach(handle=2, epoch=4, position=12)
    assert ledger.position == ledger.next_position == 12


def test_one_run_told_of_among_those_given_up_keeps_the_position_to_repeat_from(ledger: Ledger) -> None:
    ledger.reserve(2)
    ledger.reserve(3)
    ledger.failed(ConnectionLost("gone", in_doubt=True), given_up=True)
    ledger.failed(ConnectionLost("gone", in_doubt=True), given_up=False)
    ledger.detach()
    ledger.attach(handle=2, epoch=4, position=15)
    assert ledger.next_position == 10


def test_a_session_that_is_lost_is_never_ready_again(ledger: Ledger) -> None:
    ledger.reserve(1)
    ledger.failed(SessionMoved("elsewhere"), given_up=False)
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
    ledger.reserve(1)
    waiting = asyncio.create_task(ledger.changes())
    await asyncio.sleep(0)
    ledger.answered(11)
    await waiting
    waiting = asyncio.create_task(ledger.changes())
    await asyncio.sleep(0)
    ledger.lose("SESSION_EXPIRED")
    await waiting


def test_moving_by_other_means_leaves_the_next_position_to_runs_on_their_way(ledger: Ledger) -> None:
    ledger.move_to(20)
    assert ledger.next_position == 20
    ledger.reserve(2)
    ledger.move_to(21)
    assert (ledger.position, ledger.next_position) == (21, 22)
