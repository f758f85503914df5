"""What is wrong with an open, as far as this server can tell without its state store."""

from collections.abc import Sequence

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability as ContractDurability
from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service.core import Core
from cellserve_service.errors import Refusal, invalid
from cellserve_service.messages import OpenSessions
from cellserve_service.new_sessions import check_session_id, check_state, exists, no_more_sessions, session_limit
from cellserve_service.served import ServedModel
from cellserve_service.sessions import Durability

_MODES = frozenset(OpenMode.values())
_DURABILITIES = frozenset(ContractDurability.values())
# Modes in which nothing is created.
EXISTING = frozenset((OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_RESUME))


def check(core: Core, command: OpenSessions, ids: Sequence[str], room: int) -> dict[int, Refusal]:
    """Refusals by place. room: for so many new sessions."""
    served = core.model_named(command.model)
    everywhere = _check_command(core, command, served)
    if everywhere is not None or served is None:
        assert everywhere is not None
        return dict.fromkeys(range(len(ids)), everywhere)
    refusals: dict[int, Refusal] = {}
    seen: set[str] = set()
    for place, session_id in enumerate(ids):
        refusal = check_one(core, command, served, place, session_id, seen)
        seen.add(session_id)
        if refusal is None and session_id not in core.sessions.row_by_id:
            room -= 1
            if room < 0:
                refusal = session_limit(core)
        if refusal is not None:
            refusals[place] = refusal
    return refusals


def _check_command(core: Core, command: OpenSessions, served: ServedModel | None) -> Refusal | None:
    """Why no row can be opened, if none can."""
    if served is None:
        names = ", ".join(sorted(served.info.name for served in core.served)) or "none"
        message = f"no model {command.model!r} is served here; served: {names}"
        return Refusal(ErrorReason.ERROR_REASON_MODEL_NOT_FOUND, message, field="model")
    if command.mode not in _MODES:
        return invalid(f"mode {command.mode} is not known here", "mode")
    if command.durability not in _DURABILITIES:
        return invalid(f"durability {command.durability} is not known here", "durability")
    if core.is_draining:
        return no_more_sessions()
    if command.mode == OpenMode.OPEN_MODE_RESUME and not command.attach:
        return invalid("a session is resumed on a stream", "mode")
    if command.mode == OpenMode.OPEN_MODE_RESUME and command.holders is None:
        return invalid("resuming needs the marks of the holders", "holders")
    durable = command.durability in (Durability.PERIODIC, Durability.SYNC)
    if durable and core.keeping is None:
        message = "this server has no state store to keep sessions in"
        return Refusal(ErrorReason.ERROR_REASON_NO_STORE, message, field="durability")
    return None


def check_one(
    core: Core, command: OpenSessions, served: ServedModel, place: int, session_id: str, seen: set[str]
) -> Refusal | None:
    """Why a session cannot be opened as things stand here. seen: the ids before it in the command."""
    malformed = check_session_id(session_id)
    if malformed is not None:
        return malformed
    if session_id in seen:
        return invalid(f"session {session_id!r} stands twice in one command", "session_ids")
    if command.states is not None:
        mismatch = check_state(served.info, command.states[place])
        if mismatch is not None:
            return mismatch
    row = core.sessions.row_by_id.get(session_id)
    if row is None:
        is_known_here = core.keeping is None and command.mode in EXISTING
        missing = core.sessions.resolve_id(session_id) if is_known_here else None
        return missing if isinstance(missing, Refusal) else None
    if command.mode == OpenMode.OPEN_MODE_RESUME and not core.sessions.is_durable(row):
        mark = holder_of(command, place)
        if not mark or mark != int(core.sessions.holder[row]):
            return resumed_by_another(session_id)
    last = core.sessions.last_request.get(row)
    if last is not None and last.request_id and last.request_id == command.request_id:
        return None  # a repeat, which is answered as the first call was
    why = None
    if command.mode == OpenMode.OPEN_MODE_CREATE:
        why = f"session {session_id!r} exists"
    elif command.states is not None:
        why = f"session {session_id!r} exists; a state can only begin a new one"
    elif core.model_of(row) is not served:
        why = f"session {session_id!r} exists with model {core.model_of(row).info.name!r}"
    if why is not None:
        return exists(why)
    return None


def holder_of(command: OpenSessions, place: int) -> int:
    """The mark that the client gives a session; 0: none."""
    return 0 if command.holders is None else int(command.holders[place])


def resumed_by_another(session_id: str) -> Refusal:
    message = f"session {session_id!r} has another holder by now"
    return Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, message, field="holders")
