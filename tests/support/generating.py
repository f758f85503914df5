"""Calls of Generate on sessions that the oracle follows."""

from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from cellserve.v1 import session_service_pb2 as pb
from tests.support.refusals import of_error
from tests.support.wire import Follower

__all__ = ["MANY", "Generated", "begin", "break_off", "fork", "generate", "new_copy", "request_of"]

MANY = 100_000  # half a minute of the tiny model: nobody waits for their end


@dataclass
class Generated:
    """All messages of a Generate that has ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    position: int = 0
    seed: int = 0
    finish_reason: str = ""

    def take(self, message: pb.GenerateResponse) -> None:
        assert not self.finish_reason
        assert message.position == self.position + len(message.tokens) or not self.position
        self.tokens += message.tokens
        self.logprobs += np.frombuffer(message.logprobs.values, "<f4").tolist()
        self.position, self.seed = message.position, message.seed
        name = pb.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_")
        self.finish_reason = "" if name == "UNSPECIFIED" else name


def request_of(session: Follower, **fields: Any) -> pb.GenerateRequest:
    settings: dict[str, Any] = {"session_id": session.id, "max_tokens": 20} | fields
    return pb.GenerateRequest(**settings)


def generate(session: Follower, **fields: Any) -> Generated:
    """Generate to the end; the session has then consumed what was sampled."""
    result = Generated()
    for message in session.wire.sessions.Generate(request_of(session, **fields), timeout=30):
        result.take(message)
    assert result.finish_reason
    return result


def begin(session: Follower, **fields: Any) -> Any:
    """A Generate under way, whose first message has arrived."""
    call = session.wire.sessions.Generate(request_of(session, max_tokens=MANY, **fields), timeout=60)
    next(call)
    return call


def fork(session: Follower) -> Follower:
    """An independent session that stands where this one does."""
    forked = session.wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id))
    copy = Follower(session.wire, session.stream, session.model, session_id=forked.session_id, mode="ATTACH")
    copy.consumed(session.tokens)
    return copy


def break_off(session: Follower, call: Any, **fields: Any) -> None:
    """Cancel a Generate that began at the session's position with these settings.

    The session must come to a stand; what it has consumed is what the same settings draw on a copy of it.
    """
    copy = new_copy(session)
    call.cancel()
    while (position := _resting_position(session)) is None:
        pass
    number = position - session.position
    assert 0 < number < MANY
    session.consumed(generate(copy, max_tokens=number, **fields).tokens)
    session.check()


def _resting_position(session: Follower) -> int | None:
    """Where the session stands; None while a generate is under way."""
    try:
        return session.wire.state(session.id).position
    except grpc.RpcError as error:
        if of_error(error).reason != "SESSION_BUSY":
            raise
        return None


def new_copy(session: Follower) -> Follower:
    """A session of its own that has consumed the same tokens, step by step: for one that cannot be forked now."""
    copy = Follower(session.wire, session.stream, session.model)
    copy.step(session.tokens)
    return copy
