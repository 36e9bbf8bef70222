"""GGUF files written with ``struct``, without uqff and without the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

TYPES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "u64": 10, "i64": 11, "f64": 12}
CODES = dict(zip(TYPES, "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor to write: dims innermost first, as the file has them; ``offset`` None: after the one before."""

    name: str
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    """Length and bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: str, value: object) -> bytes:
    """A metadata pair of a number or a text."""
    if kind == "text":
        return text(key) + struct.pack("<I", TEXT) + text(str(value))
    return text(key) + struct.pack(f"<I{CODES[kind]}", TYPES[kind], value)


def array(key: str, kind: str, values: Sequence[object], count: int | None = None) -> bytes:
    """A metadata pair of an array; ``count`` is what it claims."""
    count = len(values) if count is None else count
    if kind == "text":
        return text(key) + struct.pack("<IIQ", ARRAY, TEXT, count) + b"".join(text(str(value)) for value in values)
    body = b"".join(struct.pack(f"<{CODES[kind]}", value) for value in values)
    return text(key) + struct.pack("<IIQ", ARRAY, TYPES[kind], count) + body


def info(tensor: Tensor, offset: int) -> bytes:
    """An item of the list of tensors."""
    head = text(tensor.name) + struct.pack("<I", len(tensor.dims))
    return head + struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims) + struct.pack("<IQ", tensor.type, offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; ``counts`` are the numbers of tensors and pairs that it claims."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join(pairs)
    data = b""
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        head += info(tensor, len(data) if tensor.offset is None else tensor.offset)
        data += tensor.data
    return head + bytes(-len(head) % alignment) + data


Q8_0 = Tensor("q", (32, 2), 8, bytes(range(68)))
F32 = Tensor("f", (3,), 0, struct.pack("<3f", 1, -2, 0.5))
ALL_KINDS = [
    pair("u8", "u8", 255),
    pair("i8", "i8", -128),
    pair("u16", "u16", 65535),
    pair("i16", "i16", -32768),
    pair("u32", "u32", 2**32 - 1),
    pair("i32", "i32", -(2**31)),
    pair("f32", "f32", 1e-5),
    pair("true", "bool", True),
    pair("text", "text", "größe"),
    pair("u64", "u64", 2**64 - 1),
    pair("i64", "i64", -(2**63)),
    pair("f64", "f64", 0.1),
    array("texts", "text", ["a", "", "bc"]),
    array("numbers", "i32", [1, -2]),
    array("none", "u8", []),
]
SOUND = gguf(ALL_KINDS, [Q8_0, F32])
