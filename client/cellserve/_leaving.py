"""How a session object lets go of its session: closes it, or detaches from it."""

from __future__ import annotations

import contextlib
from typing import Final

from cellserve._asking import call
from cellserve._attachment import Attachment
from cellserve._backoff import retried
from cellserve._identity import make_id
from cellserve.errors import CellserveError, SessionLost, SessionNotFound
from cellserve.v1.session_service_pb2 import CloseSessionRequest

__all__ = ["close", "detach"]

_MAX_DETACHING_SECONDS: Final = 5.0


async def detach(attachment: Attachment, deadline: float) -> None:
    """Gives the session up when it is quiet and whole. What goes wrong is nobody's concern any more."""
    deadline = min(deadline, attachment.loop.time() + _MAX_DETACHING_SECONDS)

    async def attempt(_: float) -> None:
        await attachment.until_answered(deadline)
        if attachment.is_in_doubt and attachment.ledger.kept is not None:
            await attachment.attach(deadline)  # nobody else has the tokens that the server may have lost
        await attachment.leave(deadline)

    with contextlib.suppress(CellserveError):
        async with attachment.turn("detach", deadline, goes_on=True):
            await retried(attempt, deadline)


async def close(attachment: Attachment, deadline: float) -> None:
    """Ends the session on the server. One that has ended already, or is somebody else's by now, is left alone."""
    ledger, request = (
        attachment.ledger,
        CloseSessionRequest(request_id=make_id(), session_id=attachment.ledger.session_id),
    )

    async def attempt(_: float) -> None:
        if ledger.lost_reason is not None:
            return
        if ledger.stranded:
            await attachment.until_answered(deadline)
        if ledger.handle is None and attachment.is_ours:
            await attachment.attach(deadline)  # under our mark: it is never closed under somebody else's hands
        conversation, handle = attachment.conversation, attachment.release()
        if conversation is not None and handle is not None:
            await conversation.send_close(ledger, handle, deadline)
        else:
            await call(attachment, lambda transport: transport.sessions.CloseSession, request, deadline)

    try:
        async with attachment.turn("close", deadline, goes_on=True):
            await retried(attempt, deadline)
    except (SessionLost, SessionNotFound):
        return
