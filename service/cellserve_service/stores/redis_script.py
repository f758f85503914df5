"""The batch as redis_batch.lua takes it, and its answers as outcomes: the only other place that knows their order."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores.operations import (
    Claim,
    ClaimAll,
    Claimed,
    ClaimResult,
    End,
    Ended,
    Listed,
    ListRows,
    Load,
    Loaded,
    Operation,
    Outcome,
    Row,
    Save,
    Written,
)

SCRIPT = resources.files("cellserve_service.stores").joinpath("redis_batch.lua").read_text()

Argument = str | int | bytes

_NO_ROW = ()


def script_arguments(operations: Sequence[Operation]) -> list[Argument]:
    """The operations, one after the other."""
    arguments: list[Argument] = []
    for operation in operations:
        match operation:
            case Save(row):
                arguments += ("S", row.session_id, *_row_arguments(row))
            case Claim():
                arguments.append("C")
                arguments += _claim_arguments(operation)
            case ClaimAll(claims):
                arguments += ("A", len(claims))
                for claim in claims:
                    arguments += _claim_arguments(claim)
            case End(session_id, reason, request_id, position, forget_at):
                arguments += ("E", session_id, int(reason), request_id, position, repr(forget_at))
            case Load(session_id):
                arguments += ("L", session_id)
            case ListRows(model, after, limit):
                arguments += ("R", model, after, limit)
    return arguments


def script_outcomes(operations: Sequence[Operation], answers: Sequence[Any]) -> list[Outcome]:
    """What the script answered to the operations."""
    return [_outcome(operation, answer) for operation, answer in zip(operations, answers, strict=True)]


def _claim_arguments(claim: Claim) -> tuple[Argument, ...]:
    return (
        claim.session_id,
        *(("0", "") if claim.model is None else ("1", claim.model)),
        claim.mode.value,
        "" if claim.holder is None else claim.holder,
        claim.epoch,
        "1" if claim.is_resident else "0",
        claim.token,
        *(("0",) if claim.created is None else ("1", *_row_arguments(claim.created))),
    )


def _row_arguments(row: Row) -> tuple[Argument, ...]:
    return (
        row.model,
        row.epoch,
        row.position,
        row.holder,
        repr(row.expires_at),  # all its digits
        row.request_id,
        row.blob,
        *(("0", b"") if row.checkpoints is None else ("1", row.checkpoints)),
    )


def _outcome(operation: Operation, answer: Any) -> Outcome:
    match operation:
        case Save() | End():
            return Written(answer.decode())
        case Claim():
            return _claimed(operation, answer)
        case ClaimAll(claims):
            return [_claimed(claim, one) for claim, one in zip(claims, answer, strict=True)]
        case Load(session_id):
            row, ended = answer
            if row is None:
                return Loaded(ended=None if ended is None else _ended(ended))
            return Loaded(*_row(session_id, row))
        case ListRows():
            rows, total = answer
            return Listed([_row(session_id.decode(), row) for session_id, row in rows], total)


def _claimed(claim: Claim, answer: Any) -> Claimed:
    result, epoch, row, ended = answer
    return Claimed(
        ClaimResult(result.decode()),
        int(epoch),
        None if row is None else _row(claim.session_id, row)[0],
        None if ended is None else _ended(ended),
    )


def _row(session_id: str, answer: Any) -> tuple[Row, int]:
    """The row, and its session's epoch."""
    model, state_epoch, position, holder, expires_at, request_id, blob, checkpoints, epoch = answer
    row = Row(
        session_id=session_id,
        model=model.decode(),
        epoch=int(state_epoch),
        position=int(position),
        holder=int(holder),
        expires_at=float(expires_at),
        request_id=request_id.decode(),
        blob=blob,
        checkpoints=checkpoints or None,
    )
    return row, int(epoch)


def _ended(answer: Any) -> Ended:
    reason, request_id, position = answer
    code = int(reason) if reason else ErrorReason.ERROR_REASON_SESSION_EXPIRED
    return Ended(code, request_id.decode(), int(position))
