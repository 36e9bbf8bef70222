"""The synthetic vectors: every family, every variant, with and without bias, and the edges of their numbers.

Codes are random, scales are plausible; the vectors called *edge* have the scales that break careless readers: negative
zero, the smallest subnormal, the largest finite number.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tools.vectors.wire import (
    GGML,
    V010,
    V011,
    V012,
    V013,
    V020,
    Blob,
    Chance,
    Shape,
    Tensor,
    Version,
    afq,
    f8q8,
    f16,
    f32,
    floats,
    fp8,
    gguf,
    hqq,
    mxfp4,
    tensor,
    u8,
    unquant,
)


class Vector(NamedTuple):
    """A valid blob, where it goes, what it is for and where it comes from."""

    folder: str
    name: str
    blob: bytes
    note: str
    provenance: dict[str, str]


EDGE_F16 = (f16(-0.0), bytes.fromhex("0100"), bytes.fromhex("ff7b"), bytes.fromhex("ff83"), f16(-0.01))
"""-0.0, smallest subnormal, 65504, largest negative subnormal, an ordinary negative number."""
EDGE_F32 = (f32(-0.0), bytes.fromhex("01000000"), f32(1e30), bytes.fromhex("ffff7f80"), f32(-0.01))
"""The same for float32, the large one small enough to be multiplied by any code."""
EDGE_BF16 = tuple(struct.pack("<H", bits) for bits in (0x8000, 0x0001, 0x7000, 0x807F, 0xBC24))
EDGES = {"F16": EDGE_F16, "F32": EDGE_F32, "BF16": EDGE_BF16}


def bias_of(chance: Chance, dtype: str, *shape: int) -> Tensor:
    """A bias with random numbers; e4m3 ones are random codes that are not NaN."""
    count = math.prod(shape)
    if dtype == "F8E4M3":
        data = _e4m3_codes(chance, count)
    elif dtype == "F64":
        data = struct.pack(f"<{count}d", *chance.uniform(-0.5, 0.5, count))
    else:
        data = chance.numbers(dtype, count)
    return tensor(dtype, *shape, data=data)


def _e4m3_codes(chance: Chance, count: int) -> bytes:
    return bytes(code - 1 if code & 0x7F == 0x7F else code for code in chance.take(count))


# ---------------------------------------------------------------------------------------------------------------------
# GGUF
# ---------------------------------------------------------------------------------------------------------------------

_FLOATS = {
    "q4_0": {"d": (0, 2)},
    "q4_1": {"d": (0, 2), "m": (2, 2)},
    "q5_0": {"d": (0, 2)},
    "q5_1": {"d": (0, 2), "m": (2, 2)},
    "q8_0": {"d": (0, 2)},
    "q8_1": {"d": (0, 2), "s": (2, 2)},
    "q2k": {"d": (80, 2), "dmin": (82, 2)},
    "q3k": {"d": (108, 2)},
    "q4k": {"d": (0, 2), "dmin": (2, 2)},
    "q5k": {"d": (0, 2), "dmin": (2, 2)},
    "q6k": {"d": (208, 2)},
    "q8k": {"d": (0, 4)},
}
"""Offset and size of the floats of a block; all other bytes may be anything."""


def ggml_blocks(chance: Chance, kind: str, count: int, *, edge: bool = False) -> bytes:
    """Blocks with random codes and sensible (or extreme) floats."""
    _, block_size, type_size = GGML[kind]
    if block_size == 1:
        dtype = kind.upper()
        return b"".join(EDGES[dtype][i % 5] for i in range(count)) if edge else chance.numbers(dtype, count)
    blocks = []
    for at in range(count):
        block = bytearray(chance.take(type_size))
        for place, (start, size) in enumerate(_FLOATS[kind].values()):
            dtype = "F16" if size == 2 else "F32"
            number = EDGES[dtype][(at + 2 * place) % 5] if edge else chance.scales(dtype, 1)
            block[start : start + size] = number
        if kind in ("q8_1", "q8k"):
            _fill_sums(block, kind)
        blocks.append(bytes(block))
    return b"".join(blocks)


def _fill_sums(block: bytearray, kind: str) -> None:
    """The sums that writers store beside the codes, as a writer would."""
    if kind == "q8_1":
        d = struct.unpack_from("<e", block, 0)[0]
        total = struct.unpack("<e", f16(float(sum(struct.unpack_from("<32b", block, 4)))))[0]
        block[2:4] = f16(max(-65504.0, min(65504.0, d * total)))
    else:
        codes = struct.unpack_from("<256b", block, 4)
        struct.pack_into("<16h", block, 260, *(sum(codes[16 * i : 16 * i + 16]) for i in range(16)))


class _Case(NamedTuple):
    name: str
    kind: str
    shape: Shape
    note: str
    version: Version = V010
    bias: tuple[str, Shape] | None = None
    edge: bool = False


def _gguf_cases() -> Iterator[_Case]:
    for kind, (_, block_size, _) in GGML.items():
        columns = {1: 5, 32: 64, 256: 256}[block_size]
        yield _Case(kind, kind, (2, columns), "two rows", V020 if kind == "q8_1" else V010)
    for kind in _FLOATS:
        yield _Case(f"{kind}-edge", kind, (5, GGML[kind][1]), "scales -0.0, subnormal, largest, negative", edge=True)
    yield _Case("f16-edge", "f16", (1, 5), "-0.0, subnormals, largest", edge=True)
    yield _Case("bf16-edge", "bf16", (1, 5), "-0.0, subnormals, large", edge=True)
    yield _Case("q4_0-bias-f32", "q4_0", (3, 32), "bias F32, as the engine writes", bias=("F32", (3,)))
    yield _Case("q4_1-v0.1.1", "q4_1", (2, 32), "version 0.1.1", V011, ("F32", (2,)))
    yield _Case("q5_0-v0.1.2", "q5_0", (2, 32), "version 0.1.2", V012)
    yield _Case("q5_1-v0.1.3", "q5_1", (2, 32), "version 0.1.3", V013)
    yield _Case("q8_0-v0.2.0", "q8_0", (2, 32), "version 0.2.0", V020, ("F32", (2,)))
    yield _Case("q8_0-bias-f16", "q8_0", (3, 32), "bias F16", bias=("F16", (3,)))
    yield _Case("q4k-bias-bf16", "q4k", (2, 256), "bias BF16", bias=("BF16", (2,)))
    yield _Case("q6k-bias-f64", "q6k", (2, 256), "bias F64", bias=("F64", (2,)))
    yield _Case("q4_0-experts", "q4_0", (2, 3, 32), "stacked experts")
    yield _Case("q8_0-experts-bias", "q8_0", (2, 3, 32), "stacked experts, a bias each", V020, ("F32", (2, 3)))
    yield _Case("q4k-experts-shared-bias", "q4k", (2, 1, 256), "stacked experts, one bias", V020, ("F32", (1,)))
    yield _Case("q6k-one-dimension", "q6k", (256,), "a weight of one dimension")
    yield _Case("f32-bias", "f32", (2, 3), "bias behind plain numbers", bias=("F32", (2,)))


def _gguf() -> Iterator[tuple[str, Blob, str]]:
    for case in _gguf_cases():
        chance = Chance(f"gguf/{case.name}")
        blocks = ggml_blocks(chance, case.kind, math.prod(case.shape) // GGML[case.kind][1], edge=case.edge)
        bias = None if case.bias is None else bias_of(chance, case.bias[0], *case.bias[1])
        yield case.name, gguf(case.kind, case.shape, blocks, bias, case.version), case.note


# ---------------------------------------------------------------------------------------------------------------------
# Unquant and FP8
# ---------------------------------------------------------------------------------------------------------------------


def _unquant() -> Iterator[tuple[str, Blob, str]]:
    for dtype, version in (("F32", V010), ("F16", V010), ("BF16", V013)):
        chance = Chance(f"unquant/{dtype}")
        weight = tensor(dtype, 3, 5, data=chance.numbers(dtype, 15))
        yield dtype.lower(), unquant(weight, None, version), "as the engine writes unquantised layers"
        yield f"{dtype.lower()}-bias", unquant(weight, bias_of(chance, dtype, 3), version), "bias of the same dtype"
        edge = tensor(dtype, 1, 5, data=b"".join(EDGES[dtype]))
        yield f"{dtype.lower()}-edge", unquant(edge, None, V020), "-0.0, subnormals, large"
    chance = Chance("unquant/experts")
    experts = tensor("F32", 2, 3, 4, data=chance.numbers("F32", 24))
    yield "f32-experts", unquant(experts, bias_of(chance, "BF16", 2, 3), V020), "stacked experts, BF16 bias each"
    numbers = {
        "U8": (V010, bytes((0, 1, 127, 128, 254, 255))),
        "U32": (V010, struct.pack("<6I", 0, 1, 2**24 + 1, 2**24 + 3, 2**31, 2**32 - 1)),
        "I32": (V010, struct.pack("<6i", 0, -1, 2**24 + 1, -(2**24) - 3, 2**31 - 1, -(2**31))),
        "I64": (V010, struct.pack("<6q", 0, -1, 2**53 + 1, 2**24 + 3, 2**63 - 1, -(2**63))),
        "F64": (V010, struct.pack("<6d", 0.1, -0.0, 1 + 2**-24, 1 + 3 * 2**-24, 1e-45, 3e38)),
        "I16": (V011, struct.pack("<6h", 0, 1, -1, 255, 32767, -32768)),
        "F8E4M3": (V012, bytes((0x00, 0x80, 0x01, 0x7E, 0xFE, 0x38))),
    }
    for dtype, (version, data) in numbers.items():
        note = f"a dtype that readers know and the engine never writes here; exists since {'.'.join(map(str, version))}"
        yield dtype.lower(), unquant(tensor(dtype, 2, 3, data=data), None, version), note


def _fp8() -> Iterator[tuple[str, Blob, str]]:
    usual = (bytes.fromhex("d9891d3b"), bytes.fromhex("d9891d3b"), f32(416.0))
    chance = Chance("fp8")
    weight = tensor("F8E4M3", 3, 16, data=_e4m3_codes(chance, 48))
    yield "plain", fp8(weight, usual), "the scale 1/416 that every tensor of magnitude up to 1 has"
    yield "bias-f32", fp8(weight, usual, bias_of(chance, "F32", 3), V013), "bias F32"
    yield "bias-f8e4m3", fp8(weight, usual, bias_of(chance, "F8E4M3", 3), V020), "bias F8E4M3, as the engine writes"
    experts = tensor("F8E4M3", 2, 2, 8, data=_e4m3_codes(chance, 32))
    yield "experts", fp8(experts, (f32(0.25), f32(0.25), f32(4.0)), None, V020), "stacked experts"
    every = tensor("F8E4M3", 2, 127, data=bytes(code for code in range(256) if code & 0x7F != 0x7F))
    yield "every-code", fp8(every, (f32(1.0), f32(2.0), f32(3.0))), "all 254 numbers; three different scales"
    yield "edge-scale", fp8(every, (EDGE_F32[1], f32(-0.0), EDGE_F32[3])), "the smallest subnormal as scale"


# ---------------------------------------------------------------------------------------------------------------------
# HQQ and AFQ
# ---------------------------------------------------------------------------------------------------------------------


class _Hqq(NamedTuple):
    name: str
    bits: int
    shape: Shape
    group_size: int
    axis: int
    note: str
    dtype: str = "F32"
    version: Version = V010
    bias: tuple[str, Shape] | None = None
    steps: int = 10
    flags: tuple[int, int] = (0, 1)
    edge: bool = False


_HQQ = (
    _Hqq("hqq4", 4, (4, 64), 64, 0, "as the engine writes 4 bit"),
    _Hqq("hqq8", 8, (4, 64), 64, 0, "as the engine writes 8 bit"),
    _Hqq("hqq4-bias", 4, (4, 64), 64, 0, "bias F32, as the engine writes", version=V013, bias=("F32", (4,))),
    _Hqq("hqq3", 3, (4, 64), 64, 0, "64 rows of M are padded to 70"),
    _Hqq("hqq2", 2, (4, 64), 64, 0, "2 bit"),
    _Hqq("hqq1", 1, (4, 64), 64, 0, "1 bit"),
    _Hqq("hqq8-axis1", 8, (4, 32), 32, 1, "groups are rows of M"),
    _Hqq("hqq4-axis1", 4, (4, 64), 32, 1, "groups are rows of M"),
    _Hqq("hqq3-axis1", 3, (3, 64), 16, 1, "12 rows of M are padded to 20"),
    _Hqq("hqq2-axis1", 2, (4, 64), 64, 1, "groups are rows of M"),
    _Hqq("hqq1-axis1", 1, (8, 32), 32, 1, "groups are rows of M"),
    _Hqq("hqq3-no-padding", 3, (4, 20), 20, 0, "20 rows of M need no padding"),
    _Hqq("hqq4-group128", 4, (2, 128), 128, 0, "group of 128", "F16", V011),
    _Hqq("hqq2-group16", 2, (5, 16), 16, 0, "group of 16", "BF16", V012),
    _Hqq("hqq4-group2", 4, (3, 7, 2), 2, 0, "the smallest 4-bit group; three dimensions", version=V020),
    _Hqq("hqq8-group1", 8, (2, 3), 1, 0, "a group per weight"),
    _Hqq("hqq4-not-whole-rows", 4, (4, 48), 64, 0, "groups of 64 on rows of 48"),
    _Hqq("hqq4-flags", 4, (2, 64), 64, 0, "no steps stated, zeros rounded, not channel-wise", steps=0, flags=(1, 0)),
    _Hqq("hqq8-experts", 8, (2, 2, 32), 64, 0, "stacked experts with a bias", "BF16", V020, ("F16", (2, 2))),
    _Hqq("hqq4-edge-f32", 4, (5, 64), 64, 0, "extreme scales and zeros", edge=True),
    _Hqq("hqq8-edge-f16", 8, (5, 64), 64, 0, "extreme scales and zeros", "F16", edge=True),
)

CODES_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def hqq_parts(chance: Chance, case: _Hqq) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes (the padding of 3 bits is 0), scales and zeros."""
    groups = math.prod(case.shape) // case.group_size
    rows, columns = (case.group_size, groups) if case.axis == 0 else (groups, case.group_size)
    height = -(-rows // CODES_PER_WORD[case.bits])
    if case.bits == 3:
        codes = [byte & 7 for byte in chance.take(rows * columns)] + [0] * (10 * height - rows) * columns
        words = []
        for place in range(height * columns):
            word = 0
            for plane in range(10):
                word = word << 3 | codes[plane * height * columns + place]
            words.append(word)
        w_q = tensor("I32", height, columns, data=struct.pack(f"<{len(words)}i", *words))
    else:
        w_q = tensor("U8", height, columns, data=chance.take(height * columns))
    shape = (1, groups) if case.axis == 0 else (groups, 1)
    if case.edge:
        edges = EDGES[case.dtype]
        scales = b"".join(edges[i % 5] for i in range(groups))
        zeros = b"".join(edges[(i + i // 5 + 1) % 5] for i in range(groups))
    else:
        scales = chance.scales(case.dtype, groups)
        zeros = _uniform(chance, case.dtype, groups, 0.0, float(2**case.bits - 1))
    return w_q, tensor(case.dtype, *shape, data=scales), tensor(case.dtype, *shape, data=zeros)


def _uniform(chance: Chance, dtype: str, count: int, low: float, high: float) -> bytes:
    """Uniform numbers in a float dtype."""
    return floats(dtype, chance.uniform(low, high, count))


def _hqq() -> Iterator[tuple[str, Blob, str]]:
    for case in _HQQ:
        chance = Chance(f"hqq/{case.name}")
        parts = hqq_parts(chance, case)
        bias = None if case.bias is None else bias_of(chance, case.bias[0], *case.bias[1])
        blob = hqq(
            parts,
            case.shape,
            case.bits,
            case.group_size,
            case.axis,
            steps=case.steps,
            round_zeros=case.flags[0],
            channel_wise=case.flags[1],
            bias=bias,
            version=case.version,
        )
        yield case.name, blob, case.note


def afq_parts(
    chance: Chance, bits: int, group_size: int, shape: Shape, dtype: str, *, edge: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and biases."""
    *outer, columns = shape
    w_q = tensor("U32", *outer, columns * bits // 32, data=chance.take(math.prod(shape) * bits // 8))
    count = math.prod(shape) // group_size
    if edge:
        edges = EDGES[dtype]
        scales = b"".join(edges[i % 5] for i in range(count))
        biases = b"".join(edges[(i + i // 5 + 3) % 5] for i in range(count))
    else:
        scales, biases = chance.scales(dtype, count), _uniform(chance, dtype, count, -0.05, 0.0)
    groups = (*outer, columns // group_size)
    return w_q, tensor(dtype, *groups, data=scales), tensor(dtype, *groups, data=biases)


def _afq() -> Iterator[tuple[str, Blob, str]]:
    dtypes = ("F32", "F16", "BF16")
    for b, bits in enumerate((2, 3, 4, 6, 8)):
        for g, group_size in enumerate((32, 64, 128)):
            name, dtype = f"afq{bits}-g{group_size}", dtypes[(b + g) % 3]
            parts = afq_parts(Chance(f"afq/{name}"), bits, group_size, (2, 128), dtype)
            yield name, afq(parts, bits, group_size, version=V020 if g == 2 else V013), f"scales {dtype}"
    for bits, dtype in ((3, "F32"), (4, "BF16"), (6, "F16")):
        chance = Chance(f"afq/bias/{bits}")
        parts = afq_parts(chance, bits, 64, (3, 64), dtype)
        blob = afq(parts, bits, 64, bias_of(chance, dtype, 3))
        yield f"afq{bits}-bias-{dtype.lower()}", blob, "bias in the dtype of the scales, as the engine writes"
    chance = Chance("afq/experts")
    parts = afq_parts(chance, 4, 32, (2, 3, 32), "F32")
    yield "afq4-experts", afq(parts, 4, 32, bias_of(chance, "F32", 2, 3), V020), "stacked experts, a bias each"
    for bits, dtype in ((8, "F32"), (2, "F16"), (4, "BF16")):
        parts = afq_parts(Chance(f"afq/edge/{bits}"), bits, 32, (5, 32), dtype, edge=True)
        yield f"afq{bits}-edge-{dtype.lower()}", afq(parts, bits, 32), "extreme scales and biases"


# ---------------------------------------------------------------------------------------------------------------------
# F8Q8 and MXFP4
# ---------------------------------------------------------------------------------------------------------------------


def f8q8_blocks(chance: Chance, numel: int, scales: bytes = b"") -> bytes:
    """Blocks with random codes; the padding behind the last weight is 0."""
    count = -(-numel // 32)
    codes = chance.take(numel) + bytes(32 * count - numel)
    scales = scales or bytes(0x20 + byte % 0x40 for byte in chance.take(count))
    return b"".join(u8(scales[i]) + codes[32 * i : 32 * i + 32] for i in range(count))


def _f8q8() -> Iterator[tuple[str, Blob, str]]:
    chance = Chance("f8q8")
    yield "plain", f8q8((2, 64), f8q8_blocks(chance, 128)), "rows are whole blocks"
    blob = f8q8((2, 32), f8q8_blocks(chance, 64), bias_of(chance, "F32", 2))
    yield "bias-f32", blob, "bias F32, as the engine writes"
    yield "across-rows", f8q8((3, 20), f8q8_blocks(chance, 60)), "blocks run across rows; 4 codes of padding"
    yield "one-weight", f8q8((1, 1), f8q8_blocks(chance, 1)), "31 codes of padding"
    blob = f8q8((2, 3, 33), f8q8_blocks(chance, 198), bias_of(chance, "BF16", 2, 3))
    yield "experts", blob, "stacked experts, blocks across rows and experts, BF16 bias each"
    edges = bytes((0x00, 0x80, 0x01, 0x07, 0x08, 0x7D, 0x7E, 0xFE))
    yield "edge-scales", f8q8((8, 32), f8q8_blocks(chance, 256, edges)), "zero, subnormal, 416, 448 and negative scales"


def mxfp4_parts(chance: Chance, shape: Shape, scales: bytes = b"") -> tuple[Tensor, Tensor]:
    """Random nibbles and exponents around 2**-6."""
    *outer, columns = shape
    blocks = tensor("U8", *outer, columns // 2, data=chance.take(math.prod(shape) // 2))
    count = math.prod(shape) // 32
    scales = scales or bytes(118 + byte % 6 for byte in chance.take(count))
    return blocks, tensor("U8", *outer, columns // 32, data=scales)


def _mxfp4() -> Iterator[tuple[str, Blob, str]]:
    chance = Chance("mxfp4")
    yield "plain", mxfp4(*mxfp4_parts(chance, (2, 64))), "two rows of two blocks"
    blob = mxfp4(*mxfp4_parts(chance, (3, 32)), bias_of(chance, "BF16", 3))
    yield "bias-bf16", blob, "bias BF16, as the engine writes"
    blob = mxfp4(*mxfp4_parts(chance, (3, 32)), bias_of(chance, "F32", 3))
    yield "bias-f32", blob, "bias F32"
    yield "experts", mxfp4(*mxfp4_parts(chance, (2, 3, 32))), "stacked experts"
    blob = mxfp4(*mxfp4_parts(chance, (2, 2, 32)), bias_of(chance, "BF16", 2, 2))
    yield "experts-bias", blob, "stacked experts, a bias each"
    every = bytes(low | 15 - low << 4 for low in range(16))
    blocks, scales = tensor("U8", 5, 16, data=5 * every), tensor("U8", 5, 1, data=bytes((0, 1, 127, 252, 254)))
    yield (
        "edge-scales",
        mxfp4(blocks, scales),
        "every nibble; exponents 0 (means 0.0), 1, 127, 252 and 254 (6.0 overflows)",
    )


CASES: dict[str, Callable[[], Iterator[tuple[str, Blob, str]]]] = {
    "gguf": _gguf,
    "unquant": _unquant,
    "hqq": _hqq,
    "fp8": _fp8,
    "afq": _afq,
    "f8q8": _f8q8,
    "mxfp4": _mxfp4,
}
"""Folder to name, blob and note of its vectors."""


def synthetic() -> list[Vector]:
    """All of them."""
    provenance = {"kind": "synthetic", "command": "python -m tools.vectors"}
    return [
        Vector(folder, name, bytes(blob), note, provenance)
        for folder, cases in CASES.items()
        for name, blob, note in cases()
    ]
