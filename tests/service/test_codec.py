"""Messages that cross to another process arrive as they were, in order."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.codec import decode, encode
from cellserve_service.errors import Refusal, invalid
from cellserve_service.outputs import NO_OUTPUTS, At, OutputArrays, OutputSpec

EVERYTHING = OutputSpec(At.EVERY, True, 3, True, True, True, True)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in type and value, arrays in dtype, shape and every bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
    elif is_dataclass(ours):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def runs(random: np.random.Generator, stream: int) -> messages.SubmitRuns:
    """A command with columns of any kind."""
    number = int(random.integers(1, 4))
    counts = random.integers(1, 4, number)
    has_vectors, by_id = random.integers(2), random.integers(4) == 0
    length = int(counts.sum())
    optional = random.integers(2, size=3)
    return messages.SubmitRuns(
        streams=np.full(number, stream),
        requests=random.integers(1, 2**63, number).astype(np.uint64),
        handles=None if by_id else random.integers(0, 2**63, number).astype(np.uint64) * 2,
        session_ids=[f"session-{one}" for one in range(number)] if by_id else None,
        counts=counts,
        tokens=None if has_vectors else random.integers(0, 2**32, length).astype(np.uint32),
        vectors=random.normal(size=(length, int(random.integers(2, 4)))).astype(np.float32) if has_vectors else None,
        positions=random.integers(0, 2**62, number) if optional[0] else None,
        timeouts_seconds=random.random(number) if optional[1] else None,
        acknowledged=random.integers(0, 2**62, number) if optional[2] else None,
        outputs=[NO_OUTPUTS, EVERYTHING][int(random.integers(2))],
        max_output_bytes=[None, 1000][int(random.integers(2))],
    )


def answers(random: np.random.Generator, stream: int) -> messages.Answers:
    """An event with outputs of any kind, or none."""
    number = int(random.integers(1, 4))
    output_rows = random.integers(0, 4, number) * int(random.integers(2))
    length = int(output_rows.sum())
    top_k = int(random.integers(1, 3))
    outputs = OutputArrays(
        next_tokens=random.integers(0, 2**32, length).astype(np.uint32),
        top_tokens=random.integers(0, 2**32, (length, top_k)).astype(np.uint32),
        states=random.normal(size=(length, 2, 8)).astype(np.float32),
    )
    return messages.Answers(
        streams=np.full(number, stream),
        requests=random.integers(1, 2**63, number).astype(np.uint64),
        positions=random.integers(0, 2**62, number),
        counts=random.integers(1, 4, number),
        remaining=random.integers(0, 4, number),
        outputs=outputs if length or random.integers(2) else OutputArrays(),
        num_output_rows=output_rows,
        accepted_at=random.random(number),
        model=int(random.integers(2)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_runs_and_answers_of_many_streams_arrive_as_they_were(seed: int) -> None:
    random = np.random.default_rng(seed)
    batch: list[object] = []
    for number in range(200):
        kind = random.integers(5)
        if kind == 0:
            batch.append(messages.EndStream(number))
        else:
            # Some alike in a row.
            make, again = [runs, answers][int(kind % 2)], int(random.integers(2**32))
            batch += [make(np.random.default_rng(again), (1 << 40) + stream) for stream in range(int(kind))]
    assert_same(decode(encode(batch)), batch)
    for message in batch[:50]:
        assert_same(decode(encode([message])), [message])


def test_other_messages_arrive_as_they_were() -> None:
    numbers = np.array([3, 4], np.uint64)
    target = messages.SessionTarget(5, numbers, session_ids=["a", "b"], request_id="x", request_digest=b"\0\1")
    state = messages.InitialState(b"print", 7, np.arange(12, dtype=np.float32).reshape(2, 6))
    moved = Refusal(ErrorReason.ERROR_REASON_SESSION_MOVED, "elsewhere", position=9)
    facts = messages.SessionFacts(
        "a", "m", 1, 2, 3, 0, Durability.DURABILITY_SYNC, None, messages.Tier.HOST, True, False, 0.5, 1.5, [("k", 2)]
    )
    batch = [
        messages.OpenSessions(
            5, numbers, "m", ["a", "b"], OpenMode.OPEN_MODE_CREATE, Durability.DURABILITY_NONE, [state, state]
        ),
        messages.SubmitGenerate(5, 1, "a", None, 10, 0.5, 3, 0.9, 2**64 - 1, (1, 2)),
        messages.ResetSessions(target),
        messages.CloseSessions(target, evicts=True),
        messages.ImportSession(target, state),
        messages.ForkSession(target, None),
        messages.ListSessions(5, 1, "", "", 10),
        messages.CancelRuns(5, numbers),
        messages.Acknowledge(5, numbers, np.array([1, 2])),
        messages.StartStream(5),
        messages.SetStreamPaused(5, paused=True),
        messages.Failures(5, numbers, (moved, invalid("no", "field"))),
        messages.SessionEnded(5, numbers, ErrorReason.ERROR_REASON_SESSION_MOVED),
        messages.SessionsListed(5, 1, [facts], 1, more=False),
        messages.StateExported(5, 1, state),
        messages.Draining(5, 1.5),
    ]
    assert_same(decode(encode(batch)), batch)
