"""Sampling on the server: the tokens of one generate as an iterator."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import deque
from typing import TYPE_CHECKING, Final, Literal

from grpc import aio

from cellserve._attachment import Attachment
from cellserve._backoff import Backoff, Patience
from cellserve._deadline import until
from cellserve._generated import BrokenOff
from cellserve._outputs import read_floats
from cellserve._status import is_passing, status_error
from cellserve._tokens import Tokens, token_column
from cellserve.errors import (
    CellserveError,
    ConnectionLost,
    PositionError,
    PositionGap,
    SessionBusy,
    SessionLost,
    TimedOut,
)
from cellserve.v1.session_service_pb2 import FinishReason, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from cellserve._transport import GenerateCall

__all__ = ["AsyncGeneration", "make_generate_request"]

_SEED_BITS: Final = 64


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
        # Chosen here, so that a generate that breaks can be asked for again.
        seed=random.getrandbits(_SEED_BITS) if seed is None else seed,
        stop_tokens=stop_tokens,
        logprobs=logprobs,
    )


class AsyncGeneration:
    """The sampled tokens, in order. Every one of them has been consumed by the session.

    It begins with the first token asked for, and goes on where it was when its connection breaks. To leave
    the loop, or drop the object, breaks it off at the server; the session may by then have consumed a few
    tokens more than were received, and its next call finds out how many.

    seed: the seed in use. finish_reason: "length" or "stop" at the end, None before. logprobs: one number for
    each token received, where asked for.
    """

    def __init__(self, attachment: Attachment, request: GenerateRequest, timeout_seconds: float) -> None:
        self.seed: int = request.seed
        self.finish_reason: Literal["length", "stop"] | None = None
        self.logprobs: list[float] = []
        self._attachment = attachment
        self._request = request
        self._timeout_seconds = timeout_seconds
        self._received: deque[int] = deque()
        self._loop = attachment.loop
        self._call: GenerateCall | None = None
        self._num_asked = self._num_left = request.max_tokens
        self._num_breaks = 0
        self._has_begun = False
        self._is_part_done = False
        self._slice_sizes: set[int] = set()  # tokens in the messages of this part: each is one held answer
        self._has_stopped = False  # whether the last token received is a stop token
        self._is_done = False

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> int:
        if not self._received and not await self._receive():
            raise StopAsyncIteration
        return self._received.popleft()

    async def aclose(self) -> None:
        """Break the generate off, if it has not ended."""
        self._received.clear()
        self._break_off()

    def __del__(self) -> None:
        if self._is_done or not self._has_begun or self._loop.is_closed():
            return
        if _is_running(self._loop):
            self._break_off()
        else:  # whichever thread collects this object, the call belongs to its loop
            self._loop.call_soon_threadsafe(_break_off, self._attachment, self._request, self._call)

    async def _receive(self) -> bool:
        """Waits for tokens, which then stand in `_received`; False at the end."""
        while not self._is_done and not self._received:
            deadline = self._loop.time() + self._timeout_seconds
            try:
                async with until(deadline, "the next token of generate", self._request.session_id):
                    await self._read(deadline)
            except asyncio.CancelledError:
                self._break_off()
                raise self._attachment.replica.transport.cancellation() from None
            except TimedOut as error:
                self._break_off()
                if error.reason is None and self._attachment.trouble is not None:
                    raise self._attachment.trouble_of("generate", in_doubt=True) from None
                raise
            except BaseException:
                self._break_off()
                raise
        return bool(self._received)

    async def _read(self, deadline: float) -> None:
        """Takes the next message. Asks again as often as the call breaks."""
        attachment, backoff, patience = self._attachment, Backoff(), Patience()
        while True:
            try:
                if self._call is None:
                    self._call = await self._begin(deadline)
                await attachment.until_kept_room()
                async with asyncio.timeout(patience.seconds):
                    message = await self._call.read()
                if isinstance(message, GenerateResponse):
                    self._take(message)
                    return
                if self._is_part_done and not self._has_all():
                    self._call = None
                    continue
                error: CellserveError = ConnectionLost("generate ended without its last word", in_doubt=True)
            except TimeoutError:
                if self._loop.time() >= deadline:
                    raise
                patience.wear_out()
                if self._call is not None:
                    self._call.cancel()
                error = ConnectionLost("nothing was heard of generate for too long", in_doubt=True)
            except aio.AioRpcError as rpc_error:
                error = status_error(rpc_error, self._request.session_id)
            self._call = None
            if self._has_all():
                self._is_done = True
                attachment.end_generating()
                return
            if not self._can_go_on(error):
                self._fail(error)
                raise error
            attachment.trouble = error
            self._num_breaks += 1
            self._slice_sizes.clear()
            await asyncio.sleep(min(backoff.next_seconds(), max(0.0, deadline - self._loop.time())))

    async def _begin(self, deadline: float) -> GenerateCall:
        attachment = self._attachment
        async with attachment.turn("generate", deadline, goes_on=self._has_begun):
            await attachment.until_quiet(deadline)
            if attachment.ledger.kept is not None:
                await attachment.attach(deadline)  # the stream tells which tokens are safe
            self._request.position = attachment.ledger.position
            # In parts of which the server holds every token until the next one begins: it runs ahead of what has come
            # here, and what it no longer holds could not be told again after a break.
            max_tokens = attachment.model.max_generate_tokens(min(self._slice_sizes, default=1))
            self._request.max_tokens = min(self._num_left, max_tokens)
            self._slice_sizes.clear()
            self._is_part_done = False
            call = attachment.replica.transport.generate(self._request)
            attachment.begin_generating()
            self._has_begun = True
        return call

    def _take(self, message: GenerateResponse) -> None:
        self._attachment.trouble = None
        self._attachment.ledger.consumed(array("I", message.tokens), message.position)
        self._received.extend(message.tokens)
        self._num_left -= len(message.tokens)
        self._has_stopped = bool(message.tokens) and message.tokens[-1] in self._request.stop_tokens
        self._is_part_done = message.finish_reason != FinishReason.FINISH_REASON_UNSPECIFIED
        if self._is_part_done:
            self._has_all()  # the rest of a slice that was cut at the end of the part says nothing of the others
        else:
            self._slice_sizes.add(len(message.tokens))
        if message.HasField("logprobs"):
            self.logprobs += read_floats(message.logprobs).tolist()

    def _has_all(self) -> bool:
        """Whether every token has come, and how it ended; the server's last word may not have come."""
        if self.finish_reason is None and self._has_begun:
            if self._has_stopped:
                self.finish_reason = "stop"
            elif self._num_left <= 0 < self._num_asked:
                self.finish_reason = "length"
        return self.finish_reason is not None

    def _can_go_on(self, error: CellserveError) -> bool:
        if is_passing(error):
            return True
        if isinstance(error, PositionGap):
            # The server has come back with an older state: it gets the tokens again.
            self._attachment.is_in_doubt = True
            return True
        # The server may not know yet that the call before this one has broken.
        return bool(self._num_breaks) and isinstance(error, SessionBusy)

    def _fail(self, error: CellserveError) -> None:
        self._is_done = True
        ledger = self._attachment.ledger
        if isinstance(error, SessionLost) and error.reason is not None:
            ledger.lose(error.reason)
        if isinstance(error, PositionError) and error.position is not None:
            ledger.stand_at(error.position)
        # Without a reason of the server's, how far it came is not known.
        self._attachment.end_generating(None if error.reason is not None else BrokenOff(self._request))

    def _break_off(self) -> None:
        if not self._is_done:
            self._is_done = True
            if self._has_begun:
                _break_off(self._attachment, self._request, self._call)


def _break_off(attachment: Attachment, request: GenerateRequest, call: GenerateCall | None) -> None:
    if call is not None:
        call.cancel()
    attachment.end_generating(BrokenOff(request))


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this is the loop's own thread."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
