"""Sampling on the server: the tokens of one generate as an iterator."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal

from grpc import aio

from cellserve._attachment import Attachment
from cellserve._deadline import until
from cellserve._outputs import read_floats
from cellserve._status import status_error
from cellserve._tokens import Tokens, token_column
from cellserve.errors import CellserveError, PositionError, SessionLost
from cellserve.v1.session_service_pb2 import FinishReason, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from cellserve._transport import GenerateCall

__all__ = ["AsyncGeneration", "make_generate_request"]

_FINISH_REASONS: dict[int, Literal["length", "stop"]] = {
    FinishReason.FINISH_REASON_LENGTH: "length",
    FinishReason.FINISH_REASON_STOP: "stop",
}


def make_generate_request(
    session_id: str,
    vocab_size: int | None,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Tokens,
    logprobs: bool,
) -> GenerateRequest:
    """The request of a generate, without its position. TypeError and ValueError for what no message can hold."""
    stop_tokens = token_column(stop, vocab_size) if vocab_size is not None else ()
    return GenerateRequest(
        session_id=session_id,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=stop_tokens,
        logprobs=logprobs,
    )


class AsyncGeneration:
    """The sampled tokens, in order. Every one of them has been consumed by the session.

    It begins with the first token asked for. To leave the loop, or drop the object, breaks it off at the
    server; the session may by then have consumed a few tokens more than were received, and its next call
    finds out how many.

    seed: the seed in use, once known. finish_reason: "length" or "stop" at the end, None before. logprobs:
    one number for each token received, where asked for.
    """

    def __init__(self, attachment: Attachment, request: GenerateRequest, timeout_seconds: float) -> None:
        self.seed: int | None = None
        self.finish_reason: Literal["length", "stop"] | None = None
        self.logprobs: list[float] = []
        self._attachment = attachment
        self._request = request
        self._timeout_seconds = timeout_seconds
        self._received: deque[int] = deque()
        self._loop = attachment.loop
        self._call: GenerateCall | None = None
        self._is_done = False

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> int:
        if not self._received and not await self._receive():
            raise StopAsyncIteration
        return self._received.popleft()

    async def _receive(self) -> bool:
        """Waits for tokens, which then stand in `_received`; False at the end."""
        while not self._is_done and not self._received:
            message = await self._read()
            if message is not None:
                self._received.extend(message.tokens)
        return bool(self._received)

    async def aclose(self) -> None:
        """Break the generate off, if it has not ended."""
        self._received.clear()
        self._break_off()

    def __del__(self) -> None:
        if self._is_done or self._call is None or self._loop.is_closed():
            return
        if _is_running(self._loop):
            self._break_off()
        else:  # whichever thread collects this object, the call belongs to its loop
            self._loop.call_soon_threadsafe(_break_off, self._attachment, self._call)

    async def _read(self) -> GenerateResponse | None:
        session_id = self._request.session_id
        deadline = self._loop.time() + self._timeout_seconds
        try:
            async with until(deadline, "the next token of generate", session_id):
                if self._call is None:
                    self._call = await self._begin(deadline)
                message = await self._call.read()
        except aio.AioRpcError as rpc_error:
            error = status_error(rpc_error, session_id)
            self._fail(error)
            raise error from None
        except asyncio.CancelledError:
            self._break_off()
            raise self._attachment.hub.transport.cancellation() from None
        except BaseException:
            self._break_off()
            raise
        if not isinstance(message, GenerateResponse):
            self._is_done = True
            self._attachment.end_generating(position_is_moving=False)
            return None
        self._attachment.ledger.move_to(message.position)
        self.seed = message.seed
        self.finish_reason = _FINISH_REASONS.get(message.finish_reason)
        if message.HasField("logprobs"):
            self.logprobs += read_floats(message.logprobs).tolist()
        return message

    async def _begin(self, deadline: float) -> GenerateCall:
        attachment = self._attachment
        async with attachment.turn("generate", deadline):
            await attachment.until_quiet(deadline)
            self._request.position = attachment.ledger.position
            call = attachment.hub.transport.generate(self._request)
            attachment.begin_generating()
        return call

    def _fail(self, error: CellserveError) -> None:
        self._is_done = True
        ledger = self._attachment.ledger
        if isinstance(error, SessionLost) and error.reason is not None:
            ledger.lose(error.reason)
        if isinstance(error, PositionError) and error.position is not None:
            ledger.move_to(error.position)
        # Without a reason of the server's, how far it came is not known.
        self._attachment.end_generating(position_is_moving=error.reason is None)

    def _break_off(self) -> None:
        if not self._is_done:
            self._is_done = True
            if self._call is not None:
                _break_off(self._attachment, self._call)


def _break_off(attachment: Attachment, call: GenerateCall) -> None:
    call.cancel()
    attachment.end_generating(position_is_moving=True)


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this is the loop's own thread."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
