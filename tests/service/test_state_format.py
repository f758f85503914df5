"""Exported states: what comes back is what went out, or it is refused."""

import numpy as np
import pytest

from cellserve.v1.values_pb2 import SessionState
from cellserve_service.errors import Refusal, reason_name
from cellserve_service.messages import InitialState
from cellserve_service.state_format import MAX_POSITION, decode_state, encode_state

VALUES = np.array([[1.5, -2.0, 3.25], [0.0, 4.0, -0.5]], np.float32)
STATE = InitialState(b"f" * 32, 77, VALUES)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_state_comes_back_as_it_was(as_bytes: bool) -> None:
    message = encode_state(STATE)
    state = decode_state(message.SerializeToString() if as_bytes else message)
    assert isinstance(state, InitialState)
    assert (state.fingerprint, state.position) == (STATE.fingerprint, STATE.position)
    assert np.array_equal(state.values, VALUES)
    assert state.values.flags.writeable


def test_the_checksum_is_the_one_that_the_contract_describes() -> None:
    # zlib.crc32 of: 32 bytes "f", position 77 (8 bytes), 2 layers, 3 numbers, then the values; by hand once.
    import struct
    import zlib

    body = b"f" * 32 + struct.pack("<Q", 77) + struct.pack("<II", 2, 3) + VALUES.astype("<f4").tobytes()
    assert encode_state(STATE).checksum == zlib.crc32(body)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"position": 78},
        {"position": MAX_POSITION + 1},
        {"num_layers": 3},
        {"state_size": 2},
        {"values": VALUES.tobytes()[:-4]},
        {"values": VALUES.tobytes()[:-1] + b"\x00"},
        {"model_fingerprint": b"g" * 32},
        {"checksum": 0},
    ],
)
def test_a_field_that_was_changed_is_noticed(change: dict[str, object]) -> None:
    message = encode_state(STATE)
    for name, value in change.items():
        setattr(message, name, value)
    refusal = decode_state(message)
    assert isinstance(refusal, Refusal)
    assert reason_name(refusal.reason) == "STATE_MISMATCH"


def test_values_that_do_not_fill_their_shape_are_refused_though_the_checksum_is_right() -> None:
    odd = encode_state(InitialState(b"f" * 32, 1, np.zeros((2, 3), np.float32)))
    odd.num_layers, odd.state_size = 1, 5
    odd.checksum = encode_state(InitialState(b"f" * 32, 1, np.zeros((1, 5), np.float32))).checksum
    assert isinstance(decode_state(odd), Refusal)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 40, SessionState().SerializeToString()])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    assert isinstance(decode_state(data), Refusal)
