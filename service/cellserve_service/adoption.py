"""Makes a session of a stored row: the server that claimed it goes on with it as if it had always had it."""

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core
from cellserve_service.errors import Refusal
from cellserve_service.sessions import ENDED_MESSAGE, NO_STREAM
from cellserve_service.snapshots import restore_answers
from cellserve_service.stores.operations import Ended, Row
from cellserve_service.stores.rows import DamagedError, LastRequest, StoredSession, decode_marks, decode_session


def adopt(core: Core, stored: Row, epoch: int) -> int | Refusal:
    """Put a stored session into the session table, held by nobody; returns its row there, or why it cannot be.

    Its id must not stand in the table, which must have room.
    """
    read = read_stored(core, stored)
    if isinstance(read, Refusal):
        return read
    served = core.model_named(stored.model)
    assert served is not None
    try:
        marks = decode_marks(stored.session_id, stored.checkpoints, read.num_layers, read.state_size)
    except DamagedError as error:
        return damaged(stored.session_id, error)
    sessions = core.sessions
    row = int(sessions.create([stored.session_id], served.index, NO_STREAM, core.now)[0])
    sessions.position[row] = sessions.accepted[row] = sessions.durable_position[row] = read.position
    # A line of its own: what another server writes that does not yet know is older, and does not count.
    sessions.epoch[row] = sessions.line[row] = epoch
    sessions.holder[row] = stored.holder
    sessions.durability[row] = read.durability
    sessions.created_at[row] = read.created_at - core.wall_offset
    if read.last_request.request_id:
        sessions.last_request[row] = read.last_request
    if marks:
        sessions.marks[row] = marks
    served.slots.replace_state(row, read.values)
    restore_answers(core, served, row, read)
    # Its time to expire counts anew, and a crash should know that.
    assert core.keeping is not None
    core.keeping.changed(row)
    return row


def read_stored(core: Core, stored: Row) -> StoredSession | Refusal:
    """The session of a row, if it is whole and of a model as it is served here."""
    served = core.model_named(stored.model)
    if served is None:
        message = f"session {stored.session_id!r} is of model {stored.model!r}, which is not served here"
        return Refusal(ErrorReason.ERROR_REASON_MODEL_NOT_FOUND, message, field="model")
    try:
        read = decode_session(stored.session_id, stored.request_id, stored.blob)
    except DamagedError as error:
        return damaged(stored.session_id, error)
    info = served.info
    if (read.fingerprint, read.num_layers, read.state_size) != (info.fingerprint, info.num_layers, info.state_size):
        message = (
            f"session {stored.session_id!r} is of another model than {info.name} version {info.version}; "
            "serve the model that it was opened with, or close it"
        )
        return Refusal(ErrorReason.ERROR_REASON_STATE_MISMATCH, message, field="session_id")
    if read.position != stored.position or not np.isfinite(read.state()).all():
        return damaged(stored.session_id, DamagedError("its columns do not fit"))
    return read


def first_answer(stored: Row | None, request_id: str) -> LastRequest | None:
    """What the call of a request id was answered, if it is what made or last changed a stored session."""
    if stored is None or not request_id or stored.request_id != request_id:
        return None
    try:
        return decode_session(stored.session_id, stored.request_id, stored.blob).last_request
    except DamagedError:
        return None


def stored_marks(stored: Row, read: StoredSession) -> list[tuple[str, int]]:
    """Names and positions of a stored session's marks, oldest first; none if they cannot be read."""
    try:
        marks = decode_marks(stored.session_id, stored.checkpoints, read.num_layers, read.state_size)
    except DamagedError:
        return []
    return [(name, position) for name, (position, _) in marks.items()]


def damaged(session_id: str, error: DamagedError) -> Refusal:
    message = f"the stored row of session {session_id!r} is damaged: {error}; it is not served, close it"
    return Refusal(ErrorReason.ERROR_REASON_STATE_DAMAGED, message, field="session_id")


def ended_refusal(session_id: str, ended: Ended) -> Refusal:
    """Why a session that the store remembers is no more."""
    reason = ErrorReason.ValueType(ended.reason)
    return Refusal(reason, f"session {session_id!r} {ENDED_MESSAGE.get(reason, 'has ended')}", field="session_id")
