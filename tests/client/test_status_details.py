"""What a unary call's status says becomes attributes of the exception."""

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio

from cellserve._status import code_name, event_error, reason_name, status_error
from cellserve.errors import AnswerNotHeld, InvalidInput, MessageTooLarge, SessionLimit, SessionMoved, Unavailable
from cellserve.v1.errors_pb2 import ErrorReason


def rpc_error(code: grpc.StatusCode, *details: Message, raw: bytes | None = None) -> aio.AioRpcError:
    status = Status(code=code.value[0], message="what the server says")
    for detail in details:
        status.details.add().Pack(detail)
    trailing = aio.Metadata(("grpc-status-details-bin", status.SerializeToString() if raw is None else raw))
    return aio.AioRpcError(code, aio.Metadata(), trailing, details="what gRPC says")


def test_reason_position_and_message_are_read_from_the_details() -> None:
    info = ErrorInfo(reason="ANSWER_NOT_HELD", domain="cellserve", metadata={"position": "812"})
    error = status_error(rpc_error(grpc.StatusCode.ABORTED, info), "editor-42")
    assert type(error) is AnswerNotHeld
    assert (error.position, error.session_id, str(error)) == (812, "editor-42", "what the server says")
    assert (error.reason, error.code) == ("ANSWER_NOT_HELD", "ABORTED")


def test_the_retry_delay_is_in_seconds() -> None:
    info = ErrorInfo(reason="SESSION_LIMIT", domain="cellserve")
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    error = status_error(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, info, retry))
    assert type(error) is SessionLimit
    assert error.retry_after_seconds == 1.5


def test_the_offending_field_is_told() -> None:
    info = ErrorInfo(reason="INVALID_INPUT", domain="cellserve")
    field = BadRequest.FieldViolation(field="vectors.values", description="not finite")
    error = status_error(rpc_error(grpc.StatusCode.INVALID_ARGUMENT, info, BadRequest(field_violations=[field])))
    assert type(error) is InvalidInput
    assert error.field == "vectors.values"


def test_a_reason_of_another_domain_and_unknown_details_are_passed_over() -> None:
    info = ErrorInfo(reason="SESSION_LIMIT", domain="proxy.example")
    error = status_error(rpc_error(grpc.StatusCode.UNAVAILABLE, Help(), info))
    assert type(error) is Unavailable
    assert error.reason is None


def test_a_status_without_details_still_says_what_grpc_said() -> None:
    error = status_error(
        aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, aio.Metadata(), aio.Metadata(), details="too large")
    )
    assert type(error) is MessageTooLarge
    assert str(error) == "too large"


def test_details_that_are_no_status_are_passed_over() -> None:
    error = status_error(rpc_error(grpc.StatusCode.UNAVAILABLE, raw=b"\xff\xff"))
    assert type(error) is Unavailable
    assert str(error) == "what gRPC says"


def test_a_row_of_a_failure_event_says_the_same() -> None:
    error = event_error(8, ErrorReason.ERROR_REASON_SESSION_LIMIT, 0, 250, "full")
    assert type(error) is SessionLimit
    assert (error.retry_after_seconds, error.position, error.code) == (0.25, None, "RESOURCE_EXHAUSTED")
    moved = event_error(10, ErrorReason.ERROR_REASON_SESSION_MOVED, 0, 0, "elsewhere")
    assert type(moved) is SessionMoved
    assert moved.retry_after_seconds is None
    held = event_error(10, ErrorReason.ERROR_REASON_ANSWER_NOT_HELD, 0, 0, "gone")
    assert held.position == 0


def test_numbers_that_nobody_knows_yet_have_names_that_say_so() -> None:
    assert code_name(999) == "UNKNOWN"
    assert reason_name(999) is None
    assert reason_name(0) is None
