"""An exported state: one serialized cellserve.v1.SessionState, checked when it comes back."""

import struct
import zlib

import numpy as np
from google.protobuf.message import DecodeError

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.values_pb2 import SessionState
from cellserve_service.errors import Refusal
from cellserve_service.messages import InitialState

FORMAT = 1
MAX_POSITION = 2**62


def encode_state(state: InitialState) -> SessionState:
    """The message of a state. state.values: (L, state_size)."""
    num_layers, state_size = state.values.shape
    message = SessionState(
        format=FORMAT,
        model_fingerprint=state.fingerprint,
        position=state.position,
        num_layers=num_layers,
        state_size=state_size,
        values=np.ascontiguousarray(state.values, "<f4").tobytes(),
    )
    message.checksum = _checksum(message)
    return message


def decode_state(message: SessionState | bytes) -> InitialState | Refusal:
    """The state of a message, or why it is none."""
    if isinstance(message, bytes):
        try:
            message = SessionState.FromString(message)
        except DecodeError:
            return _mismatch("the bytes are no exported state")
    if message.format != FORMAT:
        return _mismatch(f"the state has format {message.format}; this server reads format {FORMAT}")
    if message.checksum != _checksum(message):
        return _mismatch("the state's checksum is wrong: it was damaged on its way")
    if len(message.values) != 4 * message.num_layers * message.state_size:
        return _mismatch("the state's values do not fit its shape")
    if message.position > MAX_POSITION:
        return _mismatch(f"the state's position {message.position} is out of range")
    values = np.frombuffer(message.values, "<f4").astype(np.float32)
    return InitialState(
        message.model_fingerprint, message.position, values.reshape(message.num_layers, message.state_size)
    )


def _checksum(message: SessionState) -> int:
    head = struct.pack("<QII", message.position, message.num_layers, message.state_size)
    return zlib.crc32(message.values, zlib.crc32(message.model_fingerprint + head))


def _mismatch(message: str) -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_STATE_MISMATCH, message, field="states")
