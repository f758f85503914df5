"""The bytes of stored sessions: they come back as they were, and damage is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cellserve_service.outputs import At, OutputSpec
from cellserve_service.stepping import FloatArray
from cellserve_service.stores.rows import (
    ANSWER_DTYPE,
    DamagedError,
    LastRequest,
    StoredSession,
    decode_marks,
    decode_session,
    encode_marks,
    encode_session,
    spec_columns,
    spec_of,
)
from tests.service.profiles import QUICK

IDS = st.text("abc.:-", min_size=1, max_size=9)
POSITIONS = st.integers(0, 2**63)


@st.composite
def sessions(draw: st.DrawFn) -> StoredSession:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    answers: Any = draw(st_numpy.arrays(ANSWER_DTYPE, st.integers(0, 4)))
    return StoredSession(
        fingerprint=draw(st.binary(min_size=32, max_size=32)),
        num_layers=shape[0],
        state_size=shape[1],
        position=draw(POSITIONS),
        epoch=draw(POSITIONS),
        durability=draw(st.sampled_from([2, 3])),  # type: ignore[arg-type]
        created_at=draw(st.floats(0, 1e10)),
        last_request=LastRequest(draw(IDS), draw(POSITIONS), draw(POSITIONS)),
        values=draw(st.none() | _states(shape)),
        answers=answers,
        words=draw(st_numpy.arrays(np.uint32, st.integers(0, 9))),
    )


def _states(shape: tuple[int, int]) -> st.SearchStrategy[FloatArray]:
    return st_numpy.arrays(np.float32, shape, elements=st.floats(-5, 5, width=32))


def _facts(session: StoredSession) -> tuple[object, ...]:
    """What can be compared."""
    values = None if session.values is None else session.values.tobytes()
    columns = (session.position, session.epoch, session.durability, session.created_at, session.last_request)
    shape = (session.fingerprint, session.num_layers, session.state_size)
    return (*shape, *columns, values, session.answers.tobytes(), session.words.tobytes())


@QUICK
@given(session_id=IDS, session=sessions())
def test_a_session_comes_back_as_it_was(session_id: str, session: StoredSession) -> None:
    read = decode_session(session_id, session.last_request.request_id, encode_session(session_id, session))
    assert _facts(read) == _facts(session)
    assert read.state().shape == (session.num_layers, session.state_size)


@QUICK
@given(session=sessions(), flip=st.integers(1, 255))
def test_every_byte_that_is_changed_is_found(session: StoredSession, flip: int) -> None:
    blob = encode_session("s", session)
    for place in range(len(blob)):
        changed = blob[:place] + bytes([blob[place] ^ flip]) + blob[place + 1 :]
        with pytest.raises(DamagedError):
            decode_session("s", "", changed)


@QUICK
@given(session=sessions(), data=st.data())
def test_what_is_cut_short_or_of_another_session_is_refused(session: StoredSession, data: st.DataObject) -> None:
    blob = encode_session("s", session)
    with pytest.raises(DamagedError):
        decode_session("s", "", blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(DamagedError):
        decode_session("t", "", blob)


@QUICK
@given(data=st.data(), flip=st.integers(1, 255))
def test_marks_come_back_in_their_order_and_damage_is_found(data: st.DataObject, flip: int) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    marks = data.draw(st.dictionaries(IDS, st.tuples(POSITIONS, _states(shape)), max_size=4))
    blob = encode_marks("s", marks)
    read = decode_marks("s", blob, *shape)
    assert list(read) == list(marks)
    for name, (position, values) in marks.items():
        assert read[name][0] == position
        assert np.array_equal(read[name][1], values)
    for place in range(len(blob)):
        with pytest.raises(DamagedError):
            decode_marks("s", blob[:place] + bytes([blob[place] ^ flip]) + blob[place + 1 :], *shape)


def test_a_session_without_marks_has_none() -> None:
    assert decode_marks("s", None, 2, 3) == decode_marks("s", b"", 2, 3) == {}


@QUICK
@given(
    at=st.sampled_from(At),
    top_k=st.integers(0, 9),
    wants=st.tuples(*[st.booleans()] * 5),
)
def test_what_an_answer_was_asked_for_comes_back(at: At, top_k: int, wants: tuple[bool, ...]) -> None:
    names = ("next_token", "logprobs", "head_outputs", "states", "gates")
    spec = OutputSpec(at=at, top_k=top_k, **dict(zip(names, wants, strict=True)))
    assert spec_of(spec_columns([spec])[0]) == spec
