"""Rows, handles, and the memory of sessions that ended."""

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal
from cellserve_service.sessions import SessionTable

CLOSED, EXPIRED = ErrorReason.ERROR_REASON_SESSION_CLOSED, ErrorReason.ERROR_REASON_SESSION_EXPIRED


def _create(table: SessionTable, *ids: str, stream: int = 7) -> list[int]:
    rows: list[int] = table.create(ids, 0, stream, 1.0).tolist()
    return rows


def _end(table: SessionTable, row: int, now: float = 2.0) -> None:
    table.remember_ended(table.forget_id(row), CLOSED, now)
    table.free(row)


def _is_valid(table: SessionTable, stream: int, handle: int) -> bool:
    return bool(table.resolve_handles(stream, np.array([handle], np.uint64))[1][0])


def test_a_handle_names_its_row_on_its_own_stream_only() -> None:
    table = SessionTable(4)
    first, second = _create(table, "a", "b")
    rows, valid = table.resolve_handles(7, table.handle[[second, first]])
    assert rows.tolist() == [second, first]
    assert valid.all()
    assert not _is_valid(table, 8, int(table.handle[first]))


def test_a_handle_is_stale_after_an_epoch_and_after_the_end() -> None:
    table = SessionTable(4)
    (row,) = _create(table, "a")
    first = int(table.handle[row])
    table.begin_epoch(row, 7)
    second = int(table.handle[row])
    assert not _is_valid(table, 7, first)
    assert _is_valid(table, 7, second)
    assert table.epoch[row] == 2
    _end(table, row)
    assert not _is_valid(table, 7, second)


def test_a_row_that_is_used_again_has_another_handle() -> None:
    table = SessionTable(1)
    (row,) = _create(table, "a")
    earlier = int(table.handle[row])
    _end(table, row)
    assert _create(table, "b") == [row]
    assert int(table.handle[row]) != earlier
    assert not _is_valid(table, 7, earlier)


def test_handles_of_rows_that_there_are_not_name_nothing() -> None:
    table = SessionTable(3)
    _create(table, "a", "b", "c")
    generation = int(table.handle[2]) & 0xFFFFFFFF
    for row in (3, 4, 2**31, 2**32 - 1):
        assert not _is_valid(table, 7, row << 32 | generation)


def test_free_rows_belong_to_no_stream_not_even_to_stream_zero_of_a_session() -> None:
    table = SessionTable(2)
    assert not _is_valid(table, 7, int(table.handle[0]))
    assert not _is_valid(table, 7, 0)


def test_generations_begin_again_after_the_last_one_and_stay_in_their_half() -> None:
    table = SessionTable(2)
    (row,) = _create(table, "a")
    table.handle[row] = row << 32 | 0xFFFFFFFF
    table.begin_epoch(row, 7)
    assert int(table.handle[row]) == row << 32
    assert _is_valid(table, 7, row << 32)


def test_generations_begin_at_a_number_of_the_table_s_own() -> None:
    assert len({int(SessionTable(1).handle[0]) for _ in range(8)}) > 1


def test_an_id_that_ended_is_told_apart_from_one_that_never_was_until_it_is_forgotten() -> None:
    table = SessionTable(2)
    first, second = _create(table, "a", "b")
    _end(table, first, now=2.0)
    table.remember_ended(table.forget_id(second), EXPIRED, 3.0)
    table.free(second)

    def reason(session_id: str) -> ErrorReason.ValueType:
        refusal = table.resolve_id(session_id)
        assert isinstance(refusal, Refusal)
        return refusal.reason

    assert (reason("a"), reason("b")) == (CLOSED, EXPIRED)
    assert reason("c") == ErrorReason.ERROR_REASON_SESSION_NOT_FOUND
    table.forget_ended(before=3.0, most=9)
    assert (reason("a"), reason("b")) == (ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, EXPIRED)


def test_an_id_that_is_created_again_is_forgotten_as_ended_and_remembered_anew() -> None:
    table = SessionTable(2)
    (row,) = _create(table, "a")
    _end(table, row, now=2.0)
    (row,) = _create(table, "a")
    assert table.resolve_id("a") == row
    table.remember_ended(table.forget_id(row), EXPIRED, 9.0)
    table.free(row)
    table.forget_ended(before=5.0, most=9)
    refusal = table.resolve_id("a")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == EXPIRED


def test_only_so_many_ended_sessions_are_remembered() -> None:
    table = SessionTable(1, max_ended=2)
    for name in "abc":
        (row,) = _create(table, name)
        _end(table, row)
    reasons = [refusal.reason for refusal in map(table.resolve_id, "abc") if isinstance(refusal, Refusal)]
    assert reasons == [ErrorReason.ERROR_REASON_SESSION_NOT_FOUND, CLOSED, CLOSED]


def test_a_stream_that_lost_a_handle_to_another_one_is_told_so_until_it_ends() -> None:
    table = SessionTable(2)
    (row,) = _create(table, "a")
    handle = int(table.handle[row])
    table.remember_moved(row)
    table.begin_epoch(row, 8)
    assert table.refuse_handle(7, handle).reason == ErrorReason.ERROR_REASON_SESSION_MOVED
    assert table.refuse_handle(8, handle).reason == ErrorReason.ERROR_REASON_STALE_HANDLE
    table.release_stream(7)
    assert table.refuse_handle(7, handle).reason == ErrorReason.ERROR_REASON_STALE_HANDLE


def test_a_stream_that_ends_leaves_its_sessions_to_nobody() -> None:
    table = SessionTable(3)
    mine, other = _create(table, "a", "b")
    table.begin_epoch(other, 8)
    table.release_stream(7)
    assert table.owner[[mine, other]].tolist() == [0, 8]
