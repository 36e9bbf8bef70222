"""A reader written from the spec alone: one weight at a time, one float32 operation at a time.

It trusts its input (broken blobs are the reader's business) and uses nothing of uqff.  Numbers are numpy float32
scalars, of which every operation is rounded once, to nearest even.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tools.vectors.wire import GGML, Shape

F32 = np.float32


class Decoded(NamedTuple):
    """What a blob holds; ``values`` and ``bias`` are the float32 numbers in row-major order, little endian."""

    family: int
    kind: str
    version: str
    shape: Shape
    values: bytes
    bias: bytes | None


class _Reader:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.at = 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.blob[self.at - count : self.at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        number: int = struct.unpack("<I", self.take(4))[0]
        return number

    def f32(self) -> np.float32:
        return f32(self.take(4))

    def shape(self) -> Shape:
        return tuple(self.u32() for _ in range(self.u32()))

    def tensor(self) -> tuple[int, Shape, bytes]:
        length, dtype = self.u32(), self.u32()
        return dtype, self.shape(), self.take(length)


def f32(raw: bytes) -> np.float32:
    """A float32."""
    return F32(np.frombuffer(raw, "<f4")[0])


def f16(raw: bytes) -> np.float32:
    """A float16, widened."""
    return F32(struct.unpack("<e", raw)[0])


def bf16(raw: bytes) -> np.float32:
    """A bfloat16, widened: the upper half of a float32."""
    return f32(b"\0\0" + raw)


def e4m3(code: int) -> np.float32:
    """An e4m3 number: s eeee mmm, bias 7, no infinity."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return F32(-magnitude if code & 0x80 else magnitude)


def _integer(code: str) -> Callable[[bytes], np.float32]:
    """The nearest float32 of an integer, ties to even."""
    return lambda raw: F32(np.frombuffer(raw, code)[0])


ELEMENT: dict[int, tuple[int, Callable[[bytes], np.float32]]] = {
    0: (1, lambda raw: F32(raw[0])),
    1: (4, _integer("<u4")),
    2: (4, _integer("<i4")),
    3: (8, _integer("<i8")),
    4: (2, f16),
    5: (2, bf16),
    6: (4, f32),
    7: (8, lambda raw: F32(np.frombuffer(raw, "<f8")[0])),
    8: (2, _integer("<i2")),
    9: (1, lambda raw: e4m3(raw[0])),
}
"""Bytes per element and value of an element, by dtype code."""


def elements(dtype: int, data: bytes) -> list[np.float32]:
    """All elements of a tensor as float32."""
    size, value = ELEMENT[dtype]
    return [value(data[at : at + size]) for at in range(0, len(data), size)]


# ---------------------------------------------------------------------------------------------------------------------
# ggml: the value of element i of a block
# ---------------------------------------------------------------------------------------------------------------------


def _i8(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _nibble(qs: bytes, i: int) -> int:
    return qs[i % 16] >> 4 * (i // 16) & 15


def _crumb(qs: bytes, i: int) -> int:
    return qs[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3


def _q4_0(b: bytes, i: int) -> np.float32:
    return f16(b[0:2]) * F32(_nibble(b[2:], i) - 8)


def _q4_1(b: bytes, i: int) -> np.float32:
    return f16(b[0:2]) * F32(_nibble(b[4:], i)) + f16(b[2:4])


def _q5_0(b: bytes, i: int) -> np.float32:
    high = int.from_bytes(b[2:6], "little") >> i & 1
    return f16(b[0:2]) * F32((_nibble(b[6:], i) | high << 4) - 16)


def _q5_1(b: bytes, i: int) -> np.float32:
    high = int.from_bytes(b[4:8], "little") >> i & 1
    return f16(b[0:2]) * F32(_nibble(b[8:], i) | high << 4) + f16(b[2:4])


def _q8_0(b: bytes, i: int) -> np.float32:
    return f16(b[0:2]) * F32(_i8(b[2 + i]))


def _q8_1(b: bytes, i: int) -> np.float32:
    return f16(b[0:2]) * F32(_i8(b[4 + i]))


def _q2k(b: bytes, i: int) -> np.float32:
    d, dmin, scale = f16(b[80:82]), f16(b[82:84]), b[i // 16]
    return (d * F32(scale & 15)) * F32(_crumb(b[16:80], i)) - dmin * F32(scale >> 4)


def _q3k(b: bytes, i: int) -> np.float32:
    code = (_crumb(b[32:96], i) | (b[i % 32] >> i // 32 & 1) << 2) - 4
    scales, j = b[96:108], i // 16
    scale = (scales[j % 8] >> 4 * (j // 8) & 15 | (scales[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
    return (f16(b[108:110]) * F32(scale)) * F32(code)


def _scale_min(s: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return s[j] & 63, s[4 + j] & 63
    return s[4 + j] & 15 | s[j - 4] >> 6 << 4, s[4 + j] >> 4 | s[j] >> 6 << 4


def _q4k_code(qs: bytes, i: int) -> int:
    return qs[32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15


def _q4k(b: bytes, i: int) -> np.float32:
    scale, minimum = _scale_min(b[4:16], i // 32)
    return (f16(b[0:2]) * F32(scale)) * F32(_q4k_code(b[16:], i)) - f16(b[2:4]) * F32(minimum)


def _q5k(b: bytes, i: int) -> np.float32:
    scale, minimum = _scale_min(b[4:16], i // 32)
    code = _q4k_code(b[48:], i) | (b[16 + i % 32] >> i // 32 & 1) << 4
    return (f16(b[0:2]) * F32(scale)) * F32(code) - f16(b[2:4]) * F32(minimum)


def _q6k(b: bytes, i: int) -> np.float32:
    half, r = i // 128, i % 128
    code = (b[64 * half + r % 64] >> 4 * (r // 64) & 15 | _crumb(b[128:192], i) << 4) - 32
    return (f16(b[208:210]) * F32(_i8(b[192 + i // 16]))) * F32(code)


def _q8k(b: bytes, i: int) -> np.float32:
    return f32(b[0:4]) * F32(_i8(b[4 + i]))


GGML_VALUE: dict[str, Callable[[bytes, int], np.float32]] = {
    "f32": lambda b, _: f32(b),
    "f16": lambda b, _: f16(b),
    "bf16": lambda b, _: bf16(b),
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q8_1": _q8_1,
    "q2k": _q2k,
    "q3k": _q3k,
    "q4k": _q4k,
    "q5k": _q5k,
    "q6k": _q6k,
    "q8k": _q8k,
}

# ---------------------------------------------------------------------------------------------------------------------
# Families: each takes the reader behind the bias flag and gives kind, shape, values
# ---------------------------------------------------------------------------------------------------------------------

Body = tuple[str, Shape, list[np.float32]]


def _gguf(r: _Reader) -> Body:
    code = r.u32()
    kind, (_, block_size, type_size) = next((k, row) for k, row in GGML.items() if row[0] == code)
    shape = r.shape()
    blocks = [r.take(type_size) for _ in range(math.prod(shape) // block_size)]
    return kind, shape, [GGML_VALUE[kind](b, i) for b in blocks for i in range(block_size)]


def _unquant(r: _Reader) -> Body:
    dtype, shape, data = r.tensor()
    return "unquant", shape, elements(dtype, data)


def _hqq(r: _Reader) -> Body:
    (_, (height, columns), packed), (kind_of_scale, _, scales), (_, _, zeros) = r.tensor(), r.tensor(), r.tensor()
    shape, bits, _, axis = r.shape(), r.u8(), r.u32(), r.u8()
    r.take(4 + 1 + 1)
    scale, zero = elements(kind_of_scale, scales), elements(kind_of_scale, zeros)
    word, per_word = (4, 10) if bits == 3 else (1, 8 // bits)
    values = []
    for i in range(math.prod(shape)):
        row, column = divmod(i, columns)
        plane, line = divmod(row, height)
        at = word * (line * columns + column)
        shift = bits * (per_word - 1 - plane)
        code = int.from_bytes(packed[at : at + word], "little") >> shift & (1 << bits) - 1
        group = column if axis == 0 else row
        values.append((F32(code) - zero[group]) * scale[group])
    return f"hqq{bits}", shape, values


def _fp8(r: _Reader) -> Body:
    _, shape, data = r.tensor()
    dequant_w_scale = r.f32()
    r.take(4 + 4 + 4)
    return "fp8", shape, [e4m3(code) * dequant_w_scale for code in data]


def _afq(r: _Reader) -> Body:
    (_, packed_shape, packed), (dtype, _, scales), (_, _, biases) = r.tensor(), r.tensor(), r.tensor()
    bits, group_size = r.u8(), r.u8()
    scale, bias = elements(dtype, scales), elements(dtype, biases)
    *outer, words = packed_shape
    columns = words * 32 // bits
    values = []
    for row in range(math.prod(outer)):
        stream = int.from_bytes(packed[4 * words * row : 4 * words * (row + 1)], "little")
        for j in range(columns):
            group = (row * columns + j) // group_size
            values.append(F32(stream >> j * bits & (1 << bits) - 1) * scale[group] + bias[group])
    return f"afq{bits}", (*outer, columns), values


def _f8q8(r: _Reader) -> Body:
    num_blocks, shape = r.u32(), r.shape()
    values = []
    for _ in range(num_blocks):
        d = e4m3(r.u8()) / F32(416)
        values += [F32(_i8(code)) * d for code in r.take(32)]
    return "f8q8", shape, values[: math.prod(shape)]


def _mxfp4(r: _Reader) -> Body:
    (_, packed_shape, packed), (_, _, scales) = r.tensor(), r.tensor()
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = []
    for i in range(2 * len(packed)):
        nibble = packed[i // 2] >> 4 * (i % 2) & 15
        scale = f32(struct.pack("<I", scales[i // 32] << 23))
        values.append(F32(-magnitudes[nibble & 7] if nibble & 8 else magnitudes[nibble]) * scale)
    return "mxfp4", (*packed_shape[:-1], 2 * packed_shape[-1]), values


FAMILIES = (_gguf, _unquant, _hqq, _fp8, _afq, _f8q8, _mxfp4)


def decode(blob: bytes) -> Decoded:
    """Every number that a blob holds."""
    r = _Reader(blob)
    patch, minor, major, _ = r.take(4)
    family = r.u8()
    if family == 0:
        r.take(4)
    bias_flag = r.u8()
    with np.errstate(all="ignore"):
        kind, shape, values = FAMILIES[family](r)
        bias = None
        if bias_flag:
            dtype, _, data = r.tensor()
            bias = _joined(elements(dtype, data))
    if r.at != len(blob):
        raise ValueError(f"{len(blob) - r.at} bytes are left")
    return Decoded(family, kind, f"{major}.{minor}.{patch}", shape, _joined(values), bias)


def _joined(values: list[np.float32]) -> bytes:
    return np.array(values, "<f4").tobytes()
