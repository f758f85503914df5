"""Tells a refusal to a unary caller: the status code with google.rpc details."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cellserve_service.errors import DOMAIN, Refusal, reason_name

_STATUS_CODE = {code.value[0]: code for code in grpc.StatusCode}
# The engine names its columns; a unary caller knows the fields of its own request: the first of these that it has.
_FIELDS_OF_COLUMN = {
    "positions": ("position",),
    "counts": ("vectors", "tokens"),
    "states": ("state",),
    "session_id": ("session_ids",),
    "session_ids": ("fork_session_id",),
}
_WITH_POSITION = {"POSITION_GAP", "POSITION_CONFLICT", "ANSWER_NOT_HELD"}


def status_of(refusal: Refusal) -> Status:
    """The refusal as google.rpc.Status with ErrorInfo and, where they say something, BadRequest and RetryInfo."""
    info = ErrorInfo(domain=DOMAIN, reason=reason_name(refusal.reason))
    if info.reason in _WITH_POSITION:
        info.metadata["position"] = str(refusal.position)
    details: list[ErrorInfo | BadRequest | RetryInfo] = [info]
    if refusal.field:
        violation = BadRequest.FieldViolation(field=refusal.field, description=refusal.message)
        details.append(BadRequest(field_violations=[violation]))
    if refusal.retry_after_milliseconds:
        delay = Duration()
        delay.FromMilliseconds(refusal.retry_after_milliseconds)
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=refusal.code, message=refusal.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], refusal: Refusal, request: Message | None = None
) -> NoReturn:
    """End the call with the refusal."""
    if request is not None:
        refusal = replace(refusal, field=_field_of(request, refusal.field))
    trailer = ("grpc-status-details-bin", status_of(refusal).SerializeToString())
    await context.abort(_STATUS_CODE[int(refusal.code)], refusal.message, (trailer,))
    raise AssertionError("abort does not return")


def _field_of(request: Message, column: str) -> str:
    """The field of the request that a refusal is about."""
    known = request.DESCRIPTOR.fields_by_name
    if column.partition(".")[0] in known:
        return column
    candidates = [field for field in _FIELDS_OF_COLUMN.get(column, ()) if field in known]
    given = {field.name for field, _ in request.ListFields()}
    return next((field for field in candidates if field in given), candidates[-1] if candidates else "")
