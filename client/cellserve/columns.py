"""The contract's stream messages with every column as bytes, so that numpy reads and writes it without a loop.

On the wire a packed column of fixed-width integers is its little-endian bytes behind a tag and a length, just like a
field of bytes. So the classes here, made from the contract's descriptors with `bytes` in place of `repeated fixed32`
and `repeated fixed64`, read and write the same frames. A column that is not sent packed and whole, as every proto3
encoder sends it, is not seen here; it is then of another length than its neighbours.

The server and the client read their frames with these. Whoever speaks the contract without the client can, too.
"""

import sys
from typing import Any

import numpy as np
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from numpy.typing import NDArray

from cellserve.v1 import stream_pb2, values_pb2

__all__ = ["StreamRequest", "StreamResponse", "field_head", "read_column", "write_column", "write_field"]

_LENGTH_DELIMITED = 2
_PACKAGE = "cellserve.columns"
_FIXED = (FieldDescriptorProto.TYPE_FIXED32, FieldDescriptorProto.TYPE_FIXED64)


def _add_with_byte_columns(file: Any) -> None:
    """Add a copy of a contract file to the default pool, its columns as bytes, its messages under our package."""
    copy = FileDescriptorProto()
    file.CopyToProto(copy)
    own = {f".{copy.package}.{message.name}" for message in copy.message_type}
    copy.package = _PACKAGE
    copy.name = f"cellserve/columns/{copy.name.rpartition('/')[2]}"
    del copy.enum_type[:]
    copy.dependency.append(file.name)
    if file is not values_pb2.DESCRIPTOR:
        copy.dependency.append("cellserve/columns/values.proto")
        own |= {f".cellserve.v1.{name}" for name in values_pb2.DESCRIPTOR.message_types_by_name}
    for message in copy.message_type:
        for field in message.field:
            if field.type in _FIXED and field.label == FieldDescriptorProto.LABEL_REPEATED:
                field.type = FieldDescriptorProto.TYPE_BYTES
                field.label = FieldDescriptorProto.LABEL_OPTIONAL
            elif field.type_name in own:
                field.type_name = f".{_PACKAGE}.{field.type_name.rpartition('.')[2]}"
    descriptor_pool.Default().AddSerializedFile(copy.SerializeToString())


_add_with_byte_columns(values_pb2.DESCRIPTOR)
_add_with_byte_columns(stream_pb2.DESCRIPTOR)


def _message_class(name: str) -> type[Message]:
    found: type[Message] = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(f"{_PACKAGE}.{name}"))
    return found


# Typed as the messages they mirror would be too strict, for their columns are bytes.
StreamRequest: Any = _message_class("StreamRequest")
StreamResponse: Any = _message_class("StreamResponse")


def read_column(column: bytes, dtype: str) -> NDArray[Any]:
    """A column's numbers. dtype: '<u4', '<u8' or '<i8'. Raises ValueError where the bytes are no whole numbers."""
    return np.frombuffer(column, dtype)


def field_head(number: int, length: int) -> bytes:
    """What stands before a field that carries its length: a message, a string, bytes or a packed column.

    number: at most 15. length: bytes of its content.
    """
    tag = number << 3 | _LENGTH_DELIMITED
    if length < 0x80:
        return bytes((tag, length))
    head = bytearray((tag,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


def write_field(number: int, payload: bytes) -> bytes:
    """The whole field."""
    return field_head(number, len(payload)) + payload


def write_column(numbers: NDArray[Any], dtype: str) -> bytes:
    """A column's bytes. dtype: '<u4', '<u8' or '<f4'; whole numbers are none below zero."""
    if numbers.itemsize != int(dtype[-1]) or sys.byteorder != "little":
        numbers = numbers.astype(dtype)
    return numbers.tobytes()
