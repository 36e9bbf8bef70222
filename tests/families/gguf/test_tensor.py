"""GGUF: blocks by hand, against gguf-py, and the sizes of the layouts."""

from __future__ import annotations

import gguf as gguf_py
import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import gguf, header, run, u32
from uqff import FormatError
from uqff.codec.blob import trace
from uqff.families import GGUF
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType, block_type_of_code, block_type_of_kind

TYPES = {block_type.name: block_type for block_type in BLOCK_TYPES}
GGUF_PY = {name: name.replace("K", "_K") for name in TYPES if name not in ("Q8_1", "Q8K")}
"""Our name to gguf-py's, for the types that gguf-py dequantises."""


def f16(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def dequantize(name: str, block: bytes) -> list[float]:
    """The weights of blocks, by way of a blob."""
    block_type = TYPES[name]
    elements = len(block) // block_type.type_size * block_type.block_size
    return uqff.deserialize(gguf((elements,), block_type.code, block)).weight.dequantize().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "block_size", "type_size"),
    [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q4_0", 2, 32, 2 + 16),
        ("Q4_1", 3, 32, 2 + 2 + 16),
        ("Q5_0", 6, 32, 2 + 4 + 16),
        ("Q5_1", 7, 32, 2 + 2 + 4 + 16),
        ("Q8_0", 8, 32, 2 + 32),
        ("Q8_1", 9, 32, 2 + 2 + 32),
        ("Q2K", 10, 256, 16 + 64 + 2 + 2),
        ("Q3K", 11, 256, 32 + 64 + 12 + 2),
        ("Q4K", 12, 256, 2 + 2 + 12 + 128),
        ("Q5K", 13, 256, 2 + 2 + 12 + 32 + 128),
        ("Q6K", 14, 256, 128 + 64 + 16 + 2),
        ("Q8K", 15, 256, 4 + 256 + 2 * 16),
    ],
)
def test_block_sizes_are_field_order_sums(name: str, code: int, block_size: int, type_size: int) -> None:
    """The declared layout against the sum a reader of the C header would write, and against gguf-py's table."""
    block_type = TYPES[name]
    assert (block_type.code, block_type.block_size, block_type.type_size) == (code, block_size, type_size)
    assert block_type.numpy.itemsize == type_size
    assert block_type_of_code(code) is block_type
    assert block_type_of_kind(name.lower()) is block_type
    if name in GGUF_PY:
        number = gguf_py.GGMLQuantizationType[GGUF_PY[name]]
        assert number == code
        assert gguf_py.GGML_QUANT_SIZES[number] == (block_size, type_size)


def test_table_is_complete() -> None:
    """Fifteen types; the gaps are types that the format does not hold."""
    assert [t.code for t in BLOCK_TYPES] == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 30]
    assert block_type_of_code(4) is None
    assert block_type_of_kind("q4_k") is None


# ---------------------------------------------------------------------------------------------------------------------
# Blocks by hand
# ---------------------------------------------------------------------------------------------------------------------

NIBBLES = bytes(low | (15 - low) << 4 for low in range(16))
"""Low nibbles 0 to 15, high nibbles 15 to 0."""
UP, DOWN = list(range(16)), list(range(15, -1, -1))


def test_q4_0_by_hand() -> None:
    """D * (q - 8); byte j holds elements j and j + 16."""
    assert dequantize("Q4_0", f16(0.5) + NIBBLES) == [0.5 * (q - 8) for q in UP + DOWN]


def test_q4_1_by_hand() -> None:
    """D * q + m."""
    assert dequantize("Q4_1", f16(2, -3) + NIBBLES) == [2.0 * q - 3 for q in UP + DOWN]


def test_q5_0_by_hand() -> None:
    """D * (q - 16); the fifth bit of element j is bit j of qh."""
    qh = u32(0x8000_0001)  # elements 0 and 31
    codes = [0 + 16, *UP[1:], *DOWN[:-1], 0 + 16]
    assert dequantize("Q5_0", f16(0.25) + qh + NIBBLES) == [0.25 * (q - 16) for q in codes]


def test_q5_1_by_hand() -> None:
    """D * q + m; fifth bits as in Q5_0."""
    qh = u32(0x0001_8000)  # elements 15 and 16
    codes = [*UP[:15], 15 + 16, 15 + 16, *DOWN[1:]]
    assert dequantize("Q5_1", f16(0.5, 1) + qh + NIBBLES) == [0.5 * q + 1 for q in codes]


def test_q8_0_and_q8_1_by_hand() -> None:
    """D * q; the sum of Q8_1 plays no part."""
    codes = list(range(-16, 16))
    raw = np.array(codes, np.int8).tobytes()
    assert dequantize("Q8_0", f16(0.5) + raw) == [0.5 * q for q in codes]
    assert dequantize("Q8_1", f16(0.5, 1234) + raw) == [0.5 * q for q in codes]
    assert dequantize("Q8_0", f16(1) + b"\x80" + bytes(31))[0] == -128.0


def test_q2k_by_hand() -> None:
    """D * scale * q - dmin * min; 16 sub-blocks of 16, four of them in the bits of a run of 32 bytes."""
    scales = bytes(sub | 2 << 4 for sub in range(16))
    qs = bytes([0b11_10_01_00]) * 64
    expected = []
    for element in range(256):
        sub, q = element // 16, element % 128 // 32
        expected.append(0.5 * sub * q - 0.25 * 2)
    assert dequantize("Q2K", scales + qs + f16(0.5, 0.25)) == expected


def test_q3k_by_hand() -> None:
    """D * (scale - 32) * (q - 4 where the high bit is missing)."""
    hmask = bytes([0b0101_0101]) * 32  # elements of even runs of 32 have their third bit
    qs = bytes([0b11_10_01_00]) * 64
    # Sub-block i has scale 32 + i, so d * i. Bytes 0-7: low nibbles of i and i + 8; bytes 8-11: all high bits are 2.
    scales = bytes(i | (8 + i) << 4 for i in range(8)) + bytes([0b10_10_10_10]) * 4
    expected = []
    for element in range(256):
        q = element % 128 // 32 - (0 if element // 32 % 2 == 0 else 4)
        expected.append(0.5 * (element // 16) * q)
    assert dequantize("Q3K", hmask + qs + scales + f16(0.5)) == expected


K4_SCALES = [1, 2, 3, 4, 5, 22, 39, 56]
K4_MINS = [63, 40, 20, 10, 0, 17, 34, 51]
K4_PACKED = bytes(
    [K4_SCALES[i] | K4_SCALES[4 + i] >> 4 << 6 for i in range(4)]
    + [K4_MINS[i] | K4_MINS[4 + i] >> 4 << 6 for i in range(4)]
    + [K4_SCALES[4 + i] & 15 | (K4_MINS[4 + i] & 15) << 4 for i in range(4)]
)


def test_q4k_by_hand() -> None:
    """D * scale * q - dmin * min; runs of 64: low nibbles, then high nibbles."""
    qs = bytes(j % 16 | (15 - j % 16) << 4 for j in range(128))
    expected = []
    for element in range(256):
        sub, low = element // 32, element % 16
        q = low if sub % 2 == 0 else 15 - low
        expected.append(0.5 * K4_SCALES[sub] * q - 0.25 * K4_MINS[sub])
    assert dequantize("Q4K", f16(0.5, 0.25) + K4_PACKED + qs) == expected


def test_q5k_by_hand() -> None:
    """As Q4K with a fifth bit: bit b of byte l belongs to element 32 b + l."""
    qs = bytes(j % 16 | (15 - j % 16) << 4 for j in range(128))
    qh = bytes(0b1000_0010 if j < 16 else 0b0000_0001 for j in range(32))
    expected = []
    for element in range(256):
        sub, low = element // 32, element % 16
        q = (low if sub % 2 == 0 else 15 - low) + 16 * (qh[element % 32] >> sub & 1)
        expected.append(0.5 * K4_SCALES[sub] * q - 0.25 * K4_MINS[sub])
    assert dequantize("Q5K", f16(0.5, 0.25) + K4_PACKED + qh + qs) == expected


def test_q6k_by_hand() -> None:
    """D * scale * (q - 32); halves of 128: low four bits in runs of 64 bytes, high two in runs of 32."""
    ql = bytes(j % 16 | (15 - j % 16) << 4 for j in range(128))
    qh = bytes([0b11_10_01_00]) * 64
    scales = np.array(range(-8, 8), np.int8).tobytes()
    expected = []
    for element in range(256):
        run_of_32, low = element % 128 // 32, element % 16
        q = (low if run_of_32 < 2 else 15 - low) + 16 * run_of_32 - 32
        expected.append(0.5 * (element // 16 - 8) * q)
    assert dequantize("Q6K", ql + qh + scales + f16(0.5)) == expected


def test_q8k_by_hand() -> None:
    """D * q with d in F32; the sums play no part."""
    codes = list(range(-128, 128))
    block = np.array([0.3], "<f4").tobytes() + np.array(codes, np.int8).tobytes() + run(32)
    assert dequantize("Q8K", block) == (np.float32(0.3) * np.array(codes, np.float32)).tolist()


def test_plain_floats_by_hand() -> None:
    """F32, F16 and BF16 are blocks of one."""
    values = [1.0, -0.5, 65504.0, 2.0**-24]
    assert dequantize("F32", np.array(values, "<f4").tobytes()) == values
    assert dequantize("F16", f16(*values)) == values
    assert dequantize("BF16", bytes.fromhex("803f00bf7f4780ff")) == [1.0, -0.5, 65280.0, -np.inf]


# ---------------------------------------------------------------------------------------------------------------------
# Against gguf-py
# ---------------------------------------------------------------------------------------------------------------------


def random_blocks(block_type: BlockType, count: int, seed: int) -> np.ndarray:
    """Random codes and scales; the floats are finite, of every magnitude a half can have."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, block_type.type_size), np.uint8)
    fields = blocks.view(block_type.numpy)
    for name in block_type.numpy.names or ():
        if fields[name].dtype.kind == "f":
            magnitude = 10.0 ** rng.uniform(-7, 4, fields[name].shape)
            fields[name] = rng.choice([-1, 1], fields[name].shape) * magnitude
    if block_type.name == "BF16":
        blocks[:, 1] &= 0xBF  # exponent below 255
    return blocks


@pytest.mark.parametrize("name", GGUF_PY)
def test_random_blocks_against_gguf_py(name: str) -> None:
    """Bit-equal to an implementation by others, for the thirteen types it has."""
    block_type = TYPES[name]
    blocks = random_blocks(block_type, 12 * 32, seed=block_type.code)
    theirs = gguf_py.dequantize(blocks.reshape(12, -1), gguf_py.GGMLQuantizationType[GGUF_PY[name]])
    record = GGUF(torch.from_numpy(blocks.reshape(12, -1)), block_type)
    assert record.dequantize().numpy().tobytes() == np.ascontiguousarray(theirs, np.float32).tobytes()
    assert record._dequantize().numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["Q8_1", "Q8K"])
def test_random_blocks_of_types_that_gguf_py_lacks(name: str) -> None:
    """Bit-equal to the formula in numpy."""
    block_type = TYPES[name]
    blocks = random_blocks(block_type, 100, seed=5)
    fields = blocks.view(block_type.numpy)[:, 0]
    expected = fields["d"].astype(np.float32)[:, None] * fields["qs"].astype(np.float32)
    record = GGUF(torch.from_numpy(blocks), block_type)
    assert record.dequantize().numpy().tobytes() == expected.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_record_of_every_type(block_type: BlockType) -> None:
    """Kind and shape; the rows stay rows."""
    data = run(6 * block_type.type_size)
    weight = uqff.deserialize(gguf((3, 2 * block_type.block_size), block_type.code, data)).weight
    assert isinstance(weight, GGUF)
    assert (weight.kind, weight.shape, weight.nbytes) == (
        block_type.name.lower(),
        (3, 2 * block_type.block_size),
        len(data),
    )
    assert tuple(weight.data.shape) == (3, 2 * block_type.type_size)
    assert tuple(weight.blocks.shape) == (6, block_type.type_size)
    assert bytes(weight.data.flatten().numpy()) == data


@pytest.mark.parametrize(
    ("blob", "field", "offset"),
    [
        (header(0) + u32(18) + b"\0" + u32(4, 2, 1, 32) + run(18), "ggml_dtype", 10),
        (header(0) + u32(18) + b"\0" + u32(2, 2, 1, 31) + run(18), "shape", 18),
        (header(0) + u32(18) + b"\0" + u32(2, 0) + run(18), "ndim", 14),
        (header(0) + u32(18) + b"\0" + u32(2, 9, *[1] * 8, 32) + run(18), "ndim", 14),
        (header(0) + u32(18) + b"\0" + u32(2, 2, 0, 32) + run(18), "shape", 18),
        (header(0) + u32(17) + b"\0" + u32(2, 2, 1, 32) + run(18), "data_length", 5),
        (header(0) + u32(19) + b"\0" + u32(2, 2, 1, 32) + run(19), "data_length", 5),
        (header(0) + u32(36) + b"\0" + u32(2, 2, 2, 32) + run(35), "data", 26),
    ],
)
def test_broken_rules(blob: bytes, field: str, offset: int) -> None:
    """Each rule of the layout, with the field and place that it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(blob)
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_near_misses_parse() -> None:
    """Eight dimensions, and one, are allowed."""
    assert uqff.deserialize(gguf((1, 1, 1, 1, 1, 1, 1, 32), 2, run(18))).weight.shape == (1,) * 7 + (32,)
    assert uqff.deserialize(gguf((64,), 2, run(36))).weight.shape == (64,)


def test_length_stands_before_the_bias_flag() -> None:
    """The one family in which it does."""
    assert [(f.path, f.offset) for f in trace(gguf((2, 32), 2, run(36)))] == [
        ("version", 0),
        ("quant_type", 4),
        ("data_length", 5),
        ("bias_flag", 9),
        ("ggml_dtype", 10),
        ("ndim", 14),
        ("shape", 18),
        ("data", 26),
    ]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_blocks_at_an_odd_offset_of_their_storage(kind: str) -> None:
    """A slice of a tensor may begin anywhere in its storage: views of wider numbers need an aligned copy."""
    block_type = block_type_of_kind(kind)
    assert block_type is not None
    whole = torch.arange(1 + 8 * block_type.type_size, dtype=torch.int32).to(torch.uint8)
    record = GGUF(whole[1:].view(8, block_type.type_size), block_type)
    copied = GGUF(record.data.clone(), block_type)
    bits = [r._dequantize().view(torch.int32) for r in (record, copied)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_a_single_block_of_any_stride(block_type: BlockType) -> None:
    """Nothing says what the stride of a dimension of size 1 is; views of wider numbers would ask for a multiple."""
    values = torch.arange(block_type.type_size, dtype=torch.uint8)
    block = values.as_strided((1, block_type.type_size), (1, 1))
    assert [part.tolist() for part in block_type.unpack(block)] == [
        part.tolist() for part in block_type.unpack(values.view(1, -1))
    ]
