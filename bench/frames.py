"""Prepared messages of the service's contract, and what their answers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.raw import Exchanger
from cellserve.v1.session_service_pb2 import StepRequest, StepResponse, TokenColumn
from cellserve.v1.stream_pb2 import Command, OpenCommand, RunCommand, StreamRequest, StreamResponse
from cellserve.v1.values_pb2 import OutputAt, OutputRequest

__all__ = ["is_last", "next_tokens", "open_each", "open_many", "run_frame", "step_message", "step_next_tokens"]

_NEXT_TOKEN: Final = OutputRequest(at=OutputAt.OUTPUT_AT_EVERY, next_token=True)


async def open_each(exchanger: Exchanger, model: str) -> list[int]:
    """Open a session on every stream; returns their handles."""
    message = _frame(Command(open=OpenCommand(requests=[1], model=model)))
    answers = await exchanger.ask([message] * len(exchanger.calls))
    return [int(handle) for (answer,) in answers for handle in _opened(answer)]


async def open_many(exchanger: Exchanger, model: str, session_ids: Sequence[str]) -> list[int]:
    """Open so many sessions on the one stream that there is; returns their handles."""
    requests = range(1, 1 + len(session_ids))
    ((answer,),) = await exchanger.ask(
        [_frame(Command(open=OpenCommand(requests=requests, model=model, session_ids=session_ids)))]
    )
    return _opened(answer)


def run_frame(handles: Sequence[int], tokens: npt.NDArray[np.int64], *, wants_outputs: bool = True) -> bytes:
    """A run of each session, with the next token asked for after every one. tokens: (sessions, T)."""
    run = RunCommand(
        requests=range(1, 1 + len(handles)),
        handles=handles,
        counts=[] if tokens.shape[1] == 1 else [tokens.shape[1]] * len(handles),
        tokens=tokens.reshape(-1).tolist(),
        outputs=_NEXT_TOKEN if wants_outputs else None,
    )
    return _frame(Command(run=run))


def next_tokens(answers: Sequence[bytes]) -> list[int]:
    """Of an answer to one session's run, which comes in one message or more. Raises AssertionError where it is none."""
    tokens: list[int] = []
    for answer in answers:
        for event in StreamResponse.FromString(answer).events:
            assert event.WhichOneof("event") == "answers", event
            tokens += event.answers.outputs.next_tokens
    return tokens


def is_last(message: bytes) -> bool:
    """Whether a session's one unanswered run is answered whole by this message: a row of it has nothing remaining."""
    answers = [event.answers for event in StreamResponse.FromString(message).events if event.HasField("answers")]
    return not answers or any(not each.remaining or 0 in each.remaining for each in answers)


def step_message(session_id: str, tokens: Sequence[int]) -> bytes:
    return StepRequest(session_id=session_id, tokens=TokenColumn(ids=tokens), outputs=_NEXT_TOKEN).SerializeToString()


def step_next_tokens(answers: Sequence[bytes]) -> list[int]:
    (answer,) = answers
    return list(StepResponse.FromString(answer).outputs.next_tokens)


def _frame(command: Command) -> bytes:
    return StreamRequest(commands=[command]).SerializeToString()


def _opened(answer: bytes) -> list[int]:
    (event,) = StreamResponse.FromString(answer).events
    assert event.WhichOneof("event") == "opened", event
    order = np.argsort(event.opened.requests)
    return [int(event.opened.handles[index]) for index in order.tolist()]
