"""The exception tree: complete, as drawn, and with the codes that the contract writes down."""

import inspect
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from cellserve import errors
from cellserve._results import StepManyResult
from cellserve._status import CLASS_BY_REASON, connection_error, make_error
from cellserve.errors import (
    AccessDenied,
    CellserveError,
    ConnectionLost,
    InvalidInput,
    MessageTooLarge,
    PositionGap,
    SessionLost,
    StepManyFailed,
    TimedOut,
    Unavailable,
    Unimplemented,
)
from cellserve.v1.errors_pb2 import ErrorReason

ERRORS_PROTO = Path(__file__).parents[2] / "protos" / "cellserve" / "v1" / "errors.proto"


def contract_codes() -> dict[str, str]:
    """The code that the comment of each reason in errors.proto begins with."""
    codes: dict[str, str] = {}
    code = ""
    for line in ERRORS_PROTO.read_text().splitlines():
        if comment := re.match(r"\s+// ([A-Z_]{5,})[.,] ", line):
            code = comment[1]
        if value := re.match(r"\s+ERROR_REASON_(\w+) = [1-9]\d*;", line):
            codes[value[1]] = code
    return codes


def classes() -> dict[str, type[CellserveError]]:
    return {
        name: member
        for name, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, CellserveError)
    }


def test_every_reason_of_the_contract_has_its_exception() -> None:
    names = [value.name for value in ErrorReason.DESCRIPTOR.values]
    reasons = {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}
    assert set(CLASS_BY_REASON) == reasons


def test_every_exception_has_the_code_that_the_contract_gives_its_reason() -> None:
    assert {reason: kind.code for reason, kind in CLASS_BY_REASON.items()} == contract_codes()


def test_the_tree_at_the_top_of_the_file_is_the_tree_of_the_classes() -> None:
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if not (node := re.match(r"((?:\|   |    )*)(?:\|-- |`-- )?([A-Z]\w+)( {2,}|$)", line)):
            continue
        depth = len(node[1]) // 4 + (0 if node[2] == "CellserveError" else 1)
        parents[depth:] = [node[2]]
        drawn[node[2]] = parents[depth - 1] if depth else "Exception"
    assert drawn == {name: member.__bases__[0].__name__ for name, member in classes().items()}


def test_every_exception_is_exported() -> None:
    assert set(errors.__all__) == set(classes())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", Unavailable),
        ("DEADLINE_EXCEEDED", TimedOut),
        ("RESOURCE_EXHAUSTED", MessageTooLarge),
        ("UNIMPLEMENTED", Unimplemented),
        ("UNAUTHENTICATED", AccessDenied),
        ("PERMISSION_DENIED", AccessDenied),
        ("INVALID_ARGUMENT", InvalidInput),
        ("INTERNAL", CellserveError),
    ],
)
def test_a_failure_without_our_reason_gets_the_class_of_its_code(code: str, kind: type) -> None:
    error = make_error(None, code, "said a proxy")
    assert type(error) is kind
    assert error.code == code
    assert error.reason is None


def test_a_reason_that_only_newer_servers_know_keeps_its_name_and_gets_the_class_of_its_code() -> None:
    error = make_error("SESSION_ON_HOLIDAY", "UNAVAILABLE", "gone to the sea")
    assert type(error) is Unavailable
    assert error.reason == "SESSION_ON_HOLIDAY"


def test_invalid_input_is_a_value_error_and_timed_out_a_timeout_error() -> None:
    assert issubclass(InvalidInput, ValueError)
    assert issubclass(TimedOut, TimeoutError)


def test_a_lost_connection_says_whether_the_request_may_have_taken_effect() -> None:
    sent = connection_error("INTERNAL", "RST_STREAM", in_doubt=True, session_id="a")
    unsent = connection_error("UNAVAILABLE", "refused", in_doubt=False)
    assert isinstance(sent, ConnectionLost)
    assert isinstance(unsent, ConnectionLost)
    assert (sent.in_doubt, sent.session_id, sent.code) == (True, "a", "UNAVAILABLE")
    assert not unsent.in_doubt
    assert "doubt" in str(sent)
    assert "doubt" not in str(unsent)


def test_a_stream_that_was_refused_for_its_own_sake_is_no_lost_connection() -> None:
    assert type(connection_error("RESOURCE_EXHAUSTED", "too large", in_doubt=True)) is MessageTooLarge
    assert type(connection_error("UNIMPLEMENTED", None)) is Unimplemented


def test_whatever_a_session_can_be_lost_by_is_caught_as_session_lost() -> None:
    lost = {reason for reason, kind in CLASS_BY_REASON.items() if issubclass(kind, SessionLost)}
    assert lost == {"SESSION_EXPIRED", "SESSION_EVICTED", "SESSION_CLOSED", "SESSION_MOVED", "STALE_HANDLE"}


def test_exceptions_survive_pickling_with_what_they_carry() -> None:
    gap = PositionGap("too far", position=11, session_id="a")
    result = StepManyResult(np.array([1, 0]), np.array([1, 0]), np.array([0, 1, 1]))
    many = StepManyFailed({1: gap}, result)
    copy = pickle.loads(pickle.dumps(gap))  # noqa: S301
    assert (type(copy), str(copy), copy.position, copy.session_id) == (PositionGap, "too far", 11, "a")
    copies = pickle.loads(pickle.dumps(many))  # noqa: S301
    assert copies.failures[1].position == 11
    assert copies.result.positions.tolist() == [1, 0]
    lost = pickle.loads(pickle.dumps(ConnectionLost("gone", in_doubt=True)))  # noqa: S301
    assert lost.in_doubt
