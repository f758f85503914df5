"""What a stored session is made of, and its bytes: state, held answers, marks, behind a checksum.

L layers, S the state size, A held answers, W words of them.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.stream_pb2 import Durability
from cellserve_service.outputs import At, OutputSpec
from cellserve_service.stepping import FloatArray

FORMAT = 1

# Format, layers, state size, durability, whether there is a state (zeros are not written), answers, words,
# position and epoch of the state, wall time of creation, epoch and position that the last operation answered with.
_HEAD = struct.Struct("<HHIBBIIQQdQQ")
_CHECKSUM = struct.Struct("<I")
_MARK = struct.Struct("<HQ")  # length of the name, position
_FINGERPRINT_BYTES = 32

# One held answer. `words`: of its outputs in the row's words, one answer behind the other; 0 where none are held.
ANSWER_DTYPE = np.dtype(
    [
        ("start", "<u8"),
        ("digest", "<u8"),
        ("count", "<u4"),
        ("words", "<u4"),
        ("top_k", "<u4"),
        ("kind", "u1"),
        ("at", "u1"),
        ("wants", "u1"),  # bits of _FLAGS
        ("is_held", "u1"),
    ]
)
_FLAGS = ("next_token", "logprobs", "head_outputs", "states", "gates")


class DamagedError(Exception):
    """The bytes are not what was written."""


@dataclass(frozen=True, slots=True)
class LastRequest:
    """The operation that a session was made or last changed by, and what it answered."""

    request_id: str
    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as its row tells. `values` None: the zero state."""

    fingerprint: bytes
    num_layers: int
    state_size: int
    position: int
    epoch: int
    durability: Durability.ValueType
    created_at: float  # wall clock
    last_request: LastRequest
    values: FloatArray | None  # (L, S)
    answers: NDArray[Any]  # (A,) of ANSWER_DTYPE
    words: NDArray[np.uint32]  # (W,)

    def state(self) -> FloatArray:
        """A copy of the state: (L, S)."""
        if self.values is None:
            return np.zeros((self.num_layers, self.state_size), np.float32)
        return self.values.copy()


NO_ANSWERS = np.zeros(0, ANSWER_DTYPE)
NO_WORDS = np.zeros(0, np.uint32)


def encode_session(session_id: str, session: StoredSession) -> bytes:
    """The bytes of a row. Its id enters the checksum, so that a row is never taken for another session's."""
    values = b"" if session.values is None else np.ascontiguousarray(session.values, "<f4").tobytes()
    body = b"".join(
        (
            _HEAD.pack(
                FORMAT,
                session.num_layers,
                session.state_size,
                session.durability,
                session.values is not None,
                len(session.answers),
                len(session.words),
                session.position,
                session.epoch,
                session.created_at,
                session.last_request.epoch,
                session.last_request.position,
            ),
            session.fingerprint,
            values,
            session.answers.tobytes(),
            session.words.astype("<u4", copy=False).tobytes(),
        )
    )
    return _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(session_id.encode()))) + body


def decode_session(session_id: str, request_id: str, blob: bytes) -> StoredSession:
    """The session of a row. Raises DamagedError."""
    body = _checked(session_id, blob)
    try:
        (
            version,
            num_layers,
            state_size,
            durability,
            has_state,
            num_answers,
            num_words,
            position,
            epoch,
            created_at,
            asked_epoch,
            asked_position,
        ) = _HEAD.unpack_from(body)
    except struct.error:
        raise DamagedError("it is too short") from None
    if version != FORMAT:
        raise DamagedError(f"it has format {version}; this server reads format {FORMAT}")
    offset = _HEAD.size + _FINGERPRINT_BYTES
    num_values = num_layers * state_size if has_state else 0
    if len(body) != offset + 4 * num_values + ANSWER_DTYPE.itemsize * num_answers + 4 * num_words:
        raise DamagedError("its parts do not fit its length")
    values = np.frombuffer(body, "<f4", num_values, offset).astype(np.float32) if has_state else None
    offset += 4 * num_values
    answers = np.frombuffer(body, ANSWER_DTYPE, num_answers, offset)
    offset += answers.nbytes
    return StoredSession(
        fingerprint=body[_HEAD.size : _HEAD.size + _FINGERPRINT_BYTES],
        num_layers=num_layers,
        state_size=state_size,
        position=position,
        epoch=epoch,
        durability=Durability.ValueType(durability),
        created_at=created_at,
        last_request=LastRequest(request_id, asked_epoch, asked_position),
        values=None if values is None else values.reshape(num_layers, state_size),
        answers=answers,
        words=np.frombuffer(body, "<u4", num_words, offset).astype(np.uint32),
    )


def encode_marks(session_id: str, marks: Mapping[str, tuple[int, FloatArray]]) -> bytes:
    """The bytes of a session's marked states, oldest first: by name the position and (L, S)."""
    body = b"".join(
        _MARK.pack(len(name), position) + name.encode("ascii") + np.ascontiguousarray(values, "<f4").tobytes()
        for name, (position, values) in marks.items()
    )
    return _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(session_id.encode()))) + body


def decode_marks(
    session_id: str, blob: bytes | None, num_layers: int, state_size: int
) -> dict[str, tuple[int, FloatArray]]:
    """The marked states of a row. Raises DamagedError."""
    marks: dict[str, tuple[int, FloatArray]] = {}
    body = _checked(session_id, blob) if blob else b""
    offset, num_values = 0, num_layers * state_size
    try:
        while offset < len(body):
            length, position = _MARK.unpack_from(body, offset)
            offset += _MARK.size
            name = body[offset : offset + length].decode("ascii")
            offset += length
            values = np.frombuffer(body, "<f4", num_values, offset).astype(np.float32)
            offset += 4 * num_values
            marks[name] = (position, values.reshape(num_layers, state_size))
    except (struct.error, ValueError):
        raise DamagedError("its marks do not fit their length") from None
    return marks


def spec_columns(specs: Sequence[OutputSpec]) -> NDArray[Any]:
    """What ANSWER_DTYPE holds of output specs, one row each."""
    columns = np.zeros(len(specs), ANSWER_DTYPE)
    for place, spec in enumerate(specs):
        columns["at"][place] = spec.at
        columns["top_k"][place] = spec.top_k
        columns["wants"][place] = sum(getattr(spec, name) << bit for bit, name in enumerate(_FLAGS))
    return columns


def spec_of(answer: Any) -> OutputSpec:
    """The output spec of one held answer."""
    asked = {name: bool(int(answer["wants"]) >> bit & 1) for bit, name in enumerate(_FLAGS)}
    return OutputSpec(at=At(int(answer["at"])), top_k=int(answer["top_k"]), **asked)


def _checked(session_id: str, blob: bytes) -> bytes:
    body = blob[_CHECKSUM.size :]
    if len(blob) < _CHECKSUM.size or _CHECKSUM.unpack_from(blob)[0] != zlib.crc32(
        body, zlib.crc32(session_id.encode())
    ):
        raise DamagedError("its checksum is wrong")
    return body
