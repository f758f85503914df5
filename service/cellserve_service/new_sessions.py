"""What every new session must satisfy, however it is made, and its first row in the state store."""

import hashlib
import re
import secrets

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core
from cellserve_service.errors import Refusal, invalid
from cellserve_service.messages import InitialState
from cellserve_service.served import ServedModel
from cellserve_service.stepping import ModelInfo
from cellserve_service.stores.operations import Row
from cellserve_service.stores.rows import NO_ANSWERS, NO_WORDS, LastRequest, StoredSession, encode_session

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def made_id(request_id: str, place: int | str) -> str:
    """The id of a session that comes without one; a repeat of the call means the same session.

    place: tells the sessions of one call from each other.
    """
    if not request_id:
        return secrets.token_hex(12)
    return hashlib.sha256(f"{place} {request_id}".encode()).hexdigest()[:24]


def check_session_id(session_id: str) -> Refusal | None:
    if _SESSION_ID.fullmatch(session_id):
        return None
    shown = session_id if len(session_id) <= 128 else session_id[:125] + "..."
    return invalid(
        f"{shown!r} is no session id: 1 to 128 characters out of A-Z, a-z, 0-9, '.', '_', ':', '-'",
        "session_ids",
    )


def check_state(model: ModelInfo, state: InitialState) -> Refusal | None:
    """Why a state cannot be taken by a model, if it cannot."""
    shape = (model.num_layers, model.state_size)
    if state.fingerprint != model.fingerprint:
        message = f"the state is of another model than {model.name} version {model.version}"
    elif state.values.shape != shape:
        message = f"the state has shape {state.values.shape}; model {model.name} has {shape}"
    elif not np.isfinite(state.values).all():
        message = "the state has values that are not finite"
    else:
        return None
    return Refusal(ErrorReason.ERROR_REASON_STATE_MISMATCH, message, field="states")


def no_more_sessions() -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is draining and opens no sessions")


def session_limit(core: Core) -> Refusal:
    message = f"max_sessions {core.limits.max_sessions} sessions are open"
    return Refusal(ErrorReason.ERROR_REASON_SESSION_LIMIT, message)


def exists(message: str, field: str = "session_ids") -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_SESSION_EXISTS, message, field=field)


def first_row(
    core: Core,
    served: ServedModel,
    session_id: str,
    *,
    durability: int,
    request_id: str,
    holder: int = 0,
    state: InitialState | None = None,
) -> Row:
    """The row of a session that is about to be created. state: None for zeros."""
    info, position = served.info, 0 if state is None else state.position
    created_at = core.now + core.wall_offset
    session = StoredSession(
        fingerprint=info.fingerprint,
        num_layers=info.num_layers,
        state_size=info.state_size,
        position=position,
        epoch=1,
        durability=durability,  # type: ignore[arg-type]
        created_at=created_at,
        last_request=LastRequest(request_id, 1, position),
        values=None if state is None else state.values,
        answers=NO_ANSWERS,
        words=NO_WORDS,
    )
    return Row(
        session_id=session_id,
        model=info.name,
        epoch=session.epoch,
        position=position,
        holder=holder,
        expires_at=created_at + core.limits.idle_timeout_seconds,
        request_id=request_id,
        blob=encode_session(session_id, session),
    )
