"""Small blobs and files written out with ``struct``, field by field: what the parser tests compare with.

Nothing here uses uqff, so a mistake in the declared layouts cannot hide in its own mirror image.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

DTYPE_CODES = {"U8": 0, "U32": 1, "I32": 2, "I64": 3, "F16": 4, "BF16": 5, "F32": 6, "F64": 7, "I16": 8, "F8E4M3": 9}


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def f32(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def header(family: int, version: tuple[int, int, int] = (0, 2, 0)) -> bytes:
    """Version word (patch, minor, major, 0 on disk) and type byte."""
    return bytes([version[2], version[1], version[0], 0, family])


def record(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """The tensor record R."""
    return u32(len(data), DTYPE_CODES[dtype], len(shape), *shape) + data


def run(count: int, start: int = 1) -> bytes:
    """``count`` bytes that all differ from their neighbours."""
    return bytes((start + 7 * i) % 256 for i in range(count))


BIAS = record("F32", (2,), f32(0.5, -2.0))
"""A bias for two outputs."""


def gguf(shape: tuple[int, ...], code: int, data: bytes, bias: bytes = b"") -> bytes:
    """The bias flag stands behind the length in this family, and nowhere else."""
    return header(0) + u32(len(data)) + bytes([bool(bias)]) + u32(code, len(shape), *shape) + data + bias


def unquant(weight: bytes, bias: bytes = b"") -> bytes:
    return header(1) + bytes([bool(bias)]) + weight + bias


def hqq(
    bits: int, shape: tuple[int, ...], group: int, w_q: bytes, scales: bytes, zeros: bytes, bias: bytes = b""
) -> bytes:
    tail = u32(len(shape), *shape) + bytes([bits]) + u32(group) + b"\0" + u32(10) + b"\0\1"
    return header(2) + bytes([bool(bias)]) + w_q + scales + zeros + tail + bias


def fp8(weight: bytes, bias: bytes = b"") -> bytes:
    return header(3) + bytes([bool(bias)]) + weight + f32(0.25, 0.25, 4.0) + u32(9) + bias


def afq(bits: int, group: int, w_q: bytes, scales: bytes, biases: bytes, bias: bytes = b"") -> bytes:
    return header(4) + bytes([bool(bias)]) + w_q + scales + biases + bytes([bits, group]) + bias


def f8q8(shape: tuple[int, ...], blocks: bytes, bias: bytes = b"") -> bytes:
    return header(5) + bytes([bool(bias)]) + u32(len(blocks) // 33, len(shape), *shape) + blocks + bias


def mxfp4(blocks: bytes, scales: bytes, bias: bytes = b"") -> bytes:
    return header(6) + bytes([bool(bias)]) + blocks + scales + bias


BLOBS: dict[str, bytes] = {
    "gguf": gguf((2, 32), 2, run(36)),
    "gguf-bias": gguf((2, 32), 8, run(68), BIAS),
    "gguf-f32": gguf((2, 2), 0, f32(1, 2, 3, 4)),
    "unquant": unquant(record("BF16", (2, 3), run(12))),
    "unquant-bias": unquant(record("F32", (2, 2), f32(1, -1, 0.5, 2)), BIAS),
    "hqq": hqq(
        4, (2, 4), 4, record("U8", (2, 2), run(4)), record("F32", (1, 2), f32(1, 2)), record("F32", (1, 2), f32(3, 4))
    ),
    "hqq3-bias": hqq(
        3,
        (2, 4),
        4,
        record("I32", (1, 2), u32(0o1234567012, 0o7654321076)),
        record("F16", (1, 2), struct.pack("<2e", 1, 2)),
        record("F16", (1, 2), struct.pack("<2e", 3, 4)),
        BIAS,
    ),
    "fp8": fp8(record("F8E4M3", (2, 3), run(6))),
    "fp8-bias": fp8(record("F8E4M3", (2, 3), run(6)), record("F8E4M3", (2,), b"\x38\x40")),
    "afq": afq(
        2, 32, record("U32", (2, 2), run(16)), record("F32", (2, 1), f32(1, 2)), record("F32", (2, 1), f32(3, 4))
    ),
    "afq-bias": afq(
        3,
        32,
        record("U32", (2, 3), run(24)),
        record("BF16", (2, 1), run(4)),
        record("BF16", (2, 1), run(4, 9)),
        BIAS,
    ),
    "f8q8": f8q8((2, 20), run(66)),
    "f8q8-bias": f8q8((2, 16), run(33), BIAS),
    "mxfp4": mxfp4(record("U8", (2, 16), run(32)), record("U8", (2, 1), b"\x7f\x80")),
    "mxfp4-bias": mxfp4(record("U8", (1, 2, 16), run(32)), record("U8", (1, 2, 1), b"\x7f\x80"), BIAS),
}
"""Valid blobs of version 0.2.0, every family with and without bias, none above 150 bytes."""

BLOB = BLOBS["unquant"]


def framed(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of a header, given as an object or as its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(size: int, begin: int = 0, *, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    """One tensor of a header: a row of ``size`` bytes unless a shape is given."""
    return {"dtype": dtype, "shape": [size] if shape is None else shape, "data_offsets": [begin, begin + size]}


def file_of(blobs: dict[str, bytes]) -> bytes:
    """A UQFF file of blobs, in the order given."""
    fields, at = {}, 0
    for name, blob in blobs.items():
        fields[name] = entry(len(blob), at)
        at += len(blob)
    return framed(fields, b"".join(blobs.values()))


def write(path: Path, blobs: dict[str, bytes]) -> Path:
    """Write :func:`file_of` to a path."""
    path.write_bytes(file_of(blobs))
    return path
