"""ONNX graphs as bytes, written and taken apart without `onnx`, a package that only exports need.

Source: the encoding of Protocol Buffers, and `onnx.proto` for the numbers of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

__all__ = ["KINDS", "field", "fields", "node", "tensor", "value"]

KINDS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}
"""Dtype -> number of the kind of a tensor."""


def node(
    output: str, operator: str, *inputs: str, domain: str = "", **options: int | list[int]
) -> bytes:
    """An operator with one output; `""` stands for an input that is left out."""
    parts = [field(1, name.encode()) for name in inputs]
    parts += [field(2, output.encode()), field(4, operator.encode()), field(7, domain.encode())]
    for name, value in options.items():
        of = [field(1, name.encode())]
        if isinstance(value, int):
            of += [field(3, value), field(20, 2)]
        else:
            of += [*(field(8, one) for one in value), field(20, 7)]
        parts.append(field(5, b"".join(of)))
    return b"".join(parts)


def tensor(name: str, values: npt.NDArray[Any]) -> bytes:
    """A tensor that lies in the graph itself."""
    dims = [field(1, size) for size in values.shape]
    kind = field(2, KINDS[values.dtype.name])
    return b"".join([*dims, kind, field(8, name.encode()), field(9, values.tobytes())])


def value(name: str, dtype: str, shape: list[str]) -> bytes:
    """An input or output of a graph, with the names of its sizes."""
    dims = b"".join(field(1, field(2, size.encode())) for size in shape)
    tensor = field(1, KINDS[dtype]) + field(2, dims)
    return field(1, name.encode()) + field(2, field(1, tensor))


def field(number: int, value: int | bytes) -> bytes:
    """A field of a message: a number, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """A number in groups of 7 bits, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field, as `field` takes them, in their order.

    Raises:
        ValueError: It is none of the messages that hold numbers and bytes alone, or is cut off.
    """
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        found, at = _read_varint(message, at)
        if tag & 7 == 0:
            yield tag >> 3, found
            continue
        if tag & 7 != 2 or at + found > len(message):
            raise ValueError(f"field {tag >> 3} must be a number or whole bytes, got other data")
        yield tag >> 3, message[at : at + found]
        at += found


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while at < len(message):
        byte = message[at]
        found, at, shift = found | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return found, at
    raise ValueError("a message must end after a field, got a part of one")
