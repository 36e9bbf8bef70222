"""Blobs put together field by field from the tables of the spec, and broken field by field.

Nothing here uses uqff, so that a mistake in its declared layouts cannot reach the vectors.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DTYPES = {
    "U8": (0, 1),
    "U32": (1, 4),
    "I32": (2, 4),
    "I64": (3, 8),
    "F16": (4, 2),
    "BF16": (5, 2),
    "F32": (6, 4),
    "F64": (7, 8),
    "I16": (8, 2),
    "F8E4M3": (9, 1),
}
"""Code and bytes per element of every storable dtype."""

GGML = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 2 + 16),
    "q4_1": (3, 32, 2 + 2 + 16),
    "q5_0": (6, 32, 2 + 4 + 16),
    "q5_1": (7, 32, 2 + 2 + 4 + 16),
    "q8_0": (8, 32, 2 + 32),
    "q8_1": (9, 32, 2 + 2 + 32),
    "q2k": (10, 256, 16 + 64 + 2 + 2),
    "q3k": (11, 256, 32 + 64 + 12 + 2),
    "q4k": (12, 256, 2 + 2 + 12 + 128),
    "q5k": (13, 256, 2 + 2 + 12 + 32 + 128),
    "q6k": (14, 256, 128 + 64 + 16 + 2),
    "q8k": (15, 256, 4 + 256 + 32),
    "bf16": (30, 1, 2),
}
"""Code, weights per block and bytes per block of every ggml type."""

V010, V011, V012, V013, V020 = (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 2, 0)

Version = tuple[int, int, int]
Shape = tuple[int, ...]
Field = tuple[str, bytes]


@dataclass(frozen=True)
class Tensor:
    """What a tensor record holds."""

    dtype: str
    shape: Shape
    data: bytes


@dataclass(frozen=True)
class Blob:
    """A blob as its fields: dotted path and bytes, in file order."""

    fields: tuple[Field, ...]

    def __bytes__(self) -> bytes:
        return b"".join(data for _, data in self.fields)

    def offset(self, path: str) -> int:
        """Where a field begins."""
        at = 0
        for name, data in self.fields:
            if name == path:
                return at
            at += len(data)
        raise KeyError(path)

    def size(self, path: str) -> int:
        """Bytes of a field."""
        return len(dict(self.fields)[path])

    def replaced(self, changes: Mapping[str, bytes]) -> Blob:
        """The same blob with other bytes in some fields; the lengths may differ."""
        unknown = set(changes) - {name for name, _ in self.fields}
        if unknown:
            raise KeyError(*unknown)
        return Blob(tuple((name, changes.get(name, data)) for name, data in self.fields))


def u8(number: int) -> bytes:
    """One byte."""
    return struct.pack("<B", number)


def u32(*numbers: int) -> bytes:
    """Little-endian u32s."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def f32(*numbers: float) -> bytes:
    """Little-endian float32s."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def f16(*numbers: float) -> bytes:
    """Little-endian float16s, rounded to nearest even."""
    return struct.pack(f"<{len(numbers)}e", *numbers)


def bf16(*numbers: float) -> bytes:
    """Little-endian bfloat16s, truncated."""
    return b"".join(struct.pack("<f", number)[2:] for number in numbers)


def floats(dtype: str, numbers: Iterable[float]) -> bytes:
    """Numbers in one of the three float dtypes of scales."""
    return {"F32": f32, "F16": f16, "BF16": bf16}[dtype](*numbers)


def tensor(dtype: str, *shape: int, data: bytes) -> Tensor:
    """A tensor whose size is checked."""
    if len(data) != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError(f"{dtype} {shape} is not {len(data)} bytes")
    return Tensor(dtype, shape, data)


def record(path: str, part: Tensor) -> list[Field]:
    """The fields of a tensor record R."""
    return [
        (f"{path}.length", u32(len(part.data))),
        (f"{path}.dtype", u32(DTYPES[part.dtype][0])),
        (f"{path}.ndim", u32(len(part.shape))),
        (f"{path}.shape", u32(*part.shape)),
        (f"{path}.data", part.data),
    ]


def header(version: Version, family: int) -> list[Field]:
    """Version word (patch, minor, major, 0) and type byte."""
    major, minor, patch = version
    return [("version", bytes((patch, minor, major, 0))), ("quant_type", u8(family))]


def _flag(bias: Tensor | None) -> Field:
    return ("bias_flag", u8(bias is not None))


def _extension(bias: Tensor | None) -> list[Field]:
    return [] if bias is None else record("bias", bias)


def gguf(kind: str, shape: Shape, data: bytes, bias: Tensor | None = None, version: Version = V010) -> Blob:
    """Family 0."""
    code, block_size, type_size = GGML[kind]
    if len(data) != math.prod(shape) // block_size * type_size:
        raise ValueError(f"{kind} {shape} is not {len(data)} bytes")
    body = [
        ("data_length", u32(len(data))),
        _flag(bias),
        ("ggml_dtype", u32(code)),
        ("ndim", u32(len(shape))),
        ("shape", u32(*shape)),
        ("data", data),
    ]
    return Blob((*header(version, 0), *body, *_extension(bias)))


def unquant(weight: Tensor, bias: Tensor | None = None, version: Version = V010) -> Blob:
    """Family 1."""
    return Blob((*header(version, 1), _flag(bias), *record("weight", weight), *_extension(bias)))


def hqq(
    parts: tuple[Tensor, Tensor, Tensor],
    shape: Shape,
    bits: int,
    group_size: int,
    axis: int,
    *,
    steps: int = 10,
    round_zeros: int = 0,
    channel_wise: int = 1,
    bias: Tensor | None = None,
    version: Version = V010,
) -> Blob:
    """Family 2; ``parts`` are w_q, scales, zeros."""
    w_q, scales, zeros = parts
    body = [
        *record("w_q", w_q),
        *record("scales", scales),
        *record("zeros", zeros),
        ("ndim", u32(len(shape))),
        ("shape", u32(*shape)),
        ("bits", u8(bits)),
        ("group_size", u32(group_size)),
        ("axis", u8(axis)),
        ("optimization_steps", u32(steps)),
        ("round_zeros", u8(round_zeros)),
        ("channel_wise", u8(channel_wise)),
    ]
    return Blob((*header(version, 2), _flag(bias), *body, *_extension(bias)))


def fp8(
    weight: Tensor, scales: tuple[bytes, bytes, bytes], bias: Tensor | None = None, version: Version = V012
) -> Blob:
    """Family 3; ``scales`` are dequant_w_scale, dequant_x_scale, quant_scale."""
    body = [
        *record("weight", weight),
        ("dequant_w_scale", scales[0]),
        ("dequant_x_scale", scales[1]),
        ("quant_scale", scales[2]),
        ("dtype", u32(9)),
    ]
    return Blob((*header(version, 3), _flag(bias), *body, *_extension(bias)))


def afq(
    parts: tuple[Tensor, Tensor, Tensor],
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    version: Version = V013,
) -> Blob:
    """Family 4; ``parts`` are w_q, scales, biases."""
    w_q, scales, biases = parts
    body = [
        *record("w_q", w_q),
        *record("scales", scales),
        *record("biases", biases),
        ("bits", u8(bits)),
        ("group_size", u8(group_size)),
    ]
    return Blob((*header(version, 4), _flag(bias), *body, *_extension(bias)))


def f8q8(shape: Shape, blocks: bytes, bias: Tensor | None = None, version: Version = V020) -> Blob:
    """Family 5."""
    body = [
        ("num_blocks", u32(len(blocks) // 33)),
        ("ndim", u32(len(shape))),
        ("shape", u32(*shape)),
        ("data", blocks),
    ]
    return Blob((*header(version, 5), _flag(bias), *body, *_extension(bias)))


def mxfp4(blocks: Tensor, scales: Tensor, bias: Tensor | None = None, version: Version = V020) -> Blob:
    """Family 6."""
    body = [*record("blocks", blocks), *record("scales", scales)]
    return Blob((*header(version, 6), _flag(bias), *body, *_extension(bias)))


class Chance:
    """Reproducible random bytes: SHAKE-256 of the vector's name, read front to back."""

    def __init__(self, name: str) -> None:
        self._stream = hashlib.shake_256(name.encode()).digest(1 << 17)
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        chunk = self._stream[self._at : self._at + count]
        if len(chunk) != count:
            raise ValueError("the stream is used up")
        self._at += count
        return chunk

    def uniform(self, low: float, high: float, count: int) -> list[float]:
        """Numbers in ``[low, high)``, in steps of a 65536th."""
        return [low + (high - low) * n / 65536 for n in struct.unpack(f"<{count}H", self.take(2 * count))]

    def scales(self, dtype: str, count: int) -> bytes:
        """Scales as weights of real models have them."""
        return floats(dtype, self.uniform(0.0005, 0.02, count))

    def numbers(self, dtype: str, count: int) -> bytes:
        """Weights or biases as real models have them."""
        return floats(dtype, self.uniform(-0.5, 0.5, count))
