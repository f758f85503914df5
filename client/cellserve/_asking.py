"""Unary calls about one session, which meet it whole and are made again until they are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message

from cellserve._backoff import retried
from cellserve._status import is_passing
from cellserve.errors import CellserveError

if TYPE_CHECKING:
    from grpc import aio

    from cellserve._attachment import Attachment
    from cellserve._transport import Transport

__all__ = ["ask", "call", "replace"]

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

_GRACE_SECONDS: Final = 10.0


async def call(
    attachment: Attachment,
    pick: Callable[[Transport], aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
    request: RequestT,
    deadline: float,
    *,
    is_settling: bool = False,
) -> ResponseT:
    """A call that is made again, with the same request id, while it fails by something that passes. In a turn.

    is_settling: the call itself is a part of making the session quiet.
    """
    ledger, loop = attachment.ledger, attachment.loop

    def is_settled() -> bool:
        return is_settling or ledger.adopts_position or attachment.is_ended

    async def attempt(seconds: float) -> ResponseT:
        if (attachment.is_in_doubt or attachment.is_misplaced) and not is_settled():
            await attachment.until_quiet(deadline)
        seconds = max(min(seconds, deadline - loop.time()), 0.001)
        try:
            return await attachment.hub.call_once(attachment.replica, pick, request, seconds, ledger.session_id)
        except CellserveError as error:
            if is_passing(error):
                attachment.trouble = error  # to be told where the timeout passes before it is over
            raise

    response = await retried(attempt, deadline)
    attachment.trouble = None
    return response


async def replace(
    attachment: Attachment,
    what: str,
    pick: Callable[[Transport], aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
    request: RequestT,
    stand_of: Callable[[ResponseT], tuple[int, int]],
    deadline: float,
) -> None:
    """A call that gives the session another state, and makes its handle stale.

    stand_of: the epoch and the position, from the response.
    """
    ledger = attachment.ledger
    # Longer than the caller: the server may do it when the timeout has passed, and after what is asked next.
    until = deadline + _GRACE_SECONDS

    async def replaced() -> None:
        # Should the outcome stay in doubt, the next attach tells the position.
        ledger.adopts_position = True
        try:
            response = await call(attachment, pick, request, until)
        except CellserveError as error:
            ledger.adopts_position = error.reason is None or is_passing(error)
            raise
        attachment.replaced(*stand_of(response))

    async with attachment.turn(what, deadline):
        await attachment.until_quiet(deadline)
        attachment.release()
        await attachment.carry_out(replaced(), what, until)


async def ask(
    attachment: Attachment,
    pick: Callable[[Transport], aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
    make_request: Callable[[], RequestT],
    position_of: Callable[[ResponseT], int],
    deadline: float,
    undo: Callable[[ResponseT], Awaitable[object]] | None = None,
) -> ResponseT:
    """A call about the state of the whole session, which waits until it is quiet. In a turn.

    The server may have died and come back, and the stream not have told yet: what was done with an older state is
    undone and done again.
    """
    while True:
        await attachment.until_quiet(deadline)
        response = await call(attachment, pick, make_request(), deadline)
        if position_of(response) >= attachment.ledger.position:
            return response
        attachment.is_in_doubt = True
        if undo is not None:
            await undo(response)
