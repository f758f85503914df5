"""Answers written by hand are the contract's messages, as the generated classes read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.v1.stream_pb2 import AnswerEvent, StreamResponse
from cellserve_service.encoding import encode_event, encode_rows
from cellserve_service.messages import Answers
from cellserve_service.outputs import OutputArrays

BLOCKS = {"top_logprobs": (3,), "logprobs": (), "head_outputs": (40,), "states": (2, 4), "gates": (2, 2, 2)}


def make_answers(seed: int, number: int, output_rows: int | None, names: frozenset[str]) -> Answers:
    """Answers with these outputs. output_rows: of each answer; None: of 0 to 3."""
    random = np.random.default_rng(seed)
    num_rows = random.integers(0, 4, number) if output_rows is None else np.full(number, output_rows)
    length = int(num_rows.sum())
    arrays: dict[str, Any] = {
        name: random.normal(size=(length, *shape)).astype(np.float32) for name, shape in BLOCKS.items() if name in names
    }
    if "next_tokens" in names:
        arrays["next_tokens"] = random.integers(0, 2**32, length).astype(np.uint32)
    if "top_logprobs" in names:
        arrays["top_tokens"] = random.integers(0, 2**32, (length, 3)).astype(np.uint32)
    return Answers(
        streams=np.sort(random.integers(1, 9, number)),
        requests=random.integers(1, 2**63, number).astype(np.uint64),
        positions=random.integers(0, 2**62, number),
        counts=random.integers(1, 1 + int(random.integers(1, 4)), number),
        remaining=random.integers(0, 1 + int(random.integers(2)), number),
        outputs=OutputArrays(**arrays),
        num_output_rows=num_rows,
        accepted_at=random.random(number),
        model=0,
    )


def read(frame: bytes) -> AnswerEvent:
    [event] = StreamResponse.FromString(frame).events
    return event.answers


def check(event: AnswerEvent, answers: Answers) -> None:
    """The event tells all rows of the answers, and nothing else."""
    number, outputs = len(answers.requests), event.outputs
    assert list(event.requests) == answers.requests.tolist()
    assert list(event.positions) == answers.positions.tolist()
    assert list(event.counts or [1] * number) == answers.counts.tolist()
    assert list(event.remaining or [0] * number) == answers.remaining.tolist()
    for name in ("next_tokens", "top_tokens"):
        array = getattr(answers.outputs, name)
        assert list(getattr(outputs, name)) == ([] if array is None else array.ravel().tolist())
    blocks: Any = outputs  # the generated types know the names one by one
    for name in BLOCKS:
        array, block = getattr(answers.outputs, name), getattr(outputs, name)
        assert blocks.HasField(name) == (array is not None)
        if array is not None:
            assert tuple(block.shape) == array.shape
            assert block.values == array.astype("<f4").tobytes()


NAMES = st.frozensets(st.sampled_from(["next_tokens", *BLOCKS]))


@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(0, 3), NAMES)
def test_a_frame_for_each_row_tells_that_row(seed: int, number: int, output_rows: int, names: frozenset[str]) -> None:
    answers = make_answers(seed, number, output_rows, names)
    frames = encode_rows(answers)
    assert len(frames) == number
    for row, frame in enumerate(frames):
        check(read(frame), answers.rows(row, row + 1))


@given(st.integers(0, 10**9), st.integers(1, 6), NAMES, st.sampled_from([1, 100, 1000, 10**6]))
def test_an_event_is_told_in_frames_under_a_size(seed: int, number: int, names: frozenset[str], max_bytes: int) -> None:
    answers = make_answers(seed, number, None, names)
    told: list[int] = []
    for part, frame in encode_event(answers, max_bytes):
        assert isinstance(part, Answers)
        check(read(frame), part)
        told += part.requests.tolist()
        row_bytes = 24 * len(part.requests) + part.outputs.num_bytes
        assert len(part.requests) == 1 or row_bytes <= max_bytes
    assert told == answers.requests.tolist()


@pytest.mark.parametrize("number", [1, 5])
def test_frames_joined_are_one_message(number: int) -> None:
    answers = make_answers(1, number, 1, frozenset({"next_tokens"}))
    joined = StreamResponse.FromString(b"".join(encode_rows(answers)))
    assert [event.answers.requests[0] for event in joined.events] == answers.requests.tolist()
