"""What becomes of a generate that was broken off: where the session stands, and the tokens sampled by then."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpc import aio

from cellserve._asking import call
from cellserve._deadline import until
from cellserve.errors import SessionBusy
from cellserve.v1.session_service_pb2 import ExportSessionRequest, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from cellserve._attachment import Attachment

__all__ = ["BrokenOff"]

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """The request of the generate, to be asked for the tokens that were not received."""

    request: GenerateRequest

    async def settle(self, attachment: Attachment, deadline: float) -> bool:
        """Learns where the session stands; False where the server came back with an older state. In a turn."""
        # An export waits for what the server has accepted, and tells by SESSION_BUSY that the generate still runs.
        ledger, pause_seconds = attachment.ledger, _FIRST_PAUSE_SECONDS
        request = ExportSessionRequest(session_id=ledger.session_id)
        while True:
            try:
                response = await call(
                    attachment,
                    lambda transport: transport.sessions.ExportSession,
                    request,
                    deadline,
                    is_settling=True,
                )
                break
            except SessionBusy:
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
        position = response.state.position
        if position < ledger.position:
            attachment.is_in_doubt = True  # it gets the tokens first
            return False
        if position > ledger.position and ledger.kept is not None:
            await self._fetch(attachment, position, deadline)
        if position != ledger.position:
            ledger.stand_at(position)
        return True

    async def _fetch(self, attachment: Attachment, position: int, deadline: float) -> None:
        """Receives the tokens up to position, which the session has consumed, as far as the server still has them."""
        ledger = attachment.ledger
        request = GenerateRequest()
        request.CopyFrom(self.request)
        request.position = ledger.position
        request.max_tokens = position - ledger.position
        call = attachment.replica.transport.generate(request)
        try:
            async with until(deadline, "the rest of generate", ledger.session_id):
                while isinstance(message := await call.read(), GenerateResponse):
                    ledger.consumed(array("I", message.tokens), message.position)
        except aio.AioRpcError:
            return
        finally:
            call.cancel()
