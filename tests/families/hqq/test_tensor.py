"""HQQ: packing by hand for every width, groups along both axes, and the rules of shapes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import f32, header, hqq, record, run, u32
from tests.support.strategies import random_bytes, random_tensor
from uqff import DType, FormatError
from uqff.codec.blob import trace
from uqff.families import HQQ

PLANES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def test_4_bit_by_hand() -> None:
    """Groups are columns of M = [group, N]; the high nibbles are the first half of the rows."""
    blob = hqq(
        4,
        (2, 4),
        4,
        record("U8", (2, 2), bytes([0x1A, 0x2B, 0x3C, 0x4D])),
        record("F32", (1, 2), f32(0.5, 2)),
        record("F32", (1, 2), f32(1, 10)),
    )
    # Rows of M: [1 2] [3 4] from the high nibbles, [10 11] [12 13] from the low ones; (q - zero) * scale.
    expected = [[0.0, -16.0, 1.0, -12.0], [4.5, 2.0, 5.5, 6.0]]
    weight = uqff.deserialize(blob).weight
    assert weight.dequantize().tolist() == expected
    assert (weight.kind, weight.shape, weight.nbytes) == ("hqq4", (2, 4), 4 + 8 + 8)


@pytest.mark.parametrize(
    ("bits", "words", "codes"),
    [
        (8, [7], [7]),
        (4, [0x5A], [5, 10]),
        (2, [0b00_01_10_11], [0, 1, 2, 3]),
        (1, [0b0110_1001], [0, 1, 1, 0, 1, 0, 0, 1]),
        (3, [0o0123456701], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]),
        (3, [-1], [7] * 10),
    ],
)
def test_one_word_by_hand(bits: int, words: list[int], codes: list[int]) -> None:
    """The first code is in the highest bits; ten of 3 bits leave the two highest of an I32."""
    packed = struct.pack("<i", *words) if bits == 3 else bytes(words)
    one = record("F32", (1, 1), f32(1))
    dtype = "I32" if bits == 3 else "U8"
    blob = hqq(bits, (len(codes), 1), len(codes), record(dtype, (1, 1), packed), one, record("F32", (1, 1), f32(0)))
    assert uqff.deserialize(blob).weight.dequantize().flatten().tolist() == codes


def test_3_bit_padding_is_cut() -> None:
    """64 rows take 7 words of 10; the last 6 codes are not weights."""
    packed = record("I32", (7, 1), u32(*[0o0123456701] * 7))
    blob = hqq(3, (8, 8), 64, packed, record("F32", (1, 1), f32(1)), record("F32", (1, 1), f32(0)))
    weight = uqff.deserialize(blob).weight
    assert tuple(weight.dequantize().shape) == (8, 8)
    digits = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert weight.dequantize().flatten().tolist() == [digits[row // 7] for row in range(64)]


def by_definition(weight: HQQ) -> np.ndarray:
    """Element by element, from the module's drawing."""
    rows, columns = (weight.group_size, -1) if weight.axis == 0 else (-1, weight.group_size)
    groups = weight.numel // weight.group_size
    rows, columns = (rows, groups) if weight.axis == 0 else (groups, columns)
    words = weight.w_q.numpy().view("<i4") if weight.bits == 3 else weight.w_q.numpy()
    scales, zeros = (part.to(torch.float32).numpy() for part in (weight.scales, weight.zeros))
    height, planes = len(words), PLANES[weight.bits]
    result = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            shift = weight.bits * (planes - 1 - row // height)
            code = np.float32(int(words[row % height, column]) >> shift & (1 << weight.bits) - 1)
            group = (0, column) if weight.axis == 0 else (row, 0)
            result[row, column] = (code - zeros[group]) * scales[group]
    return result.reshape(weight.shape)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", PLANES)
def test_random_codes_against_the_definition(bits: int, axis: int, dtype: DType) -> None:
    """Bit-equal to a loop over elements, for every width, axis and dtype of scales."""
    rows, columns = 16, 12
    packed = (2, 4 * columns) if bits == 3 else (rows // PLANES[bits], columns)
    groups = columns if axis == 0 else rows
    rng = np.random.default_rng(bits)
    scales, zeros = (
        torch.from_numpy(rng.normal(size=(1, groups) if axis == 0 else (groups, 1))).to(dtype.torch) for _ in range(2)
    )
    weight = HQQ(random_bytes(1, packed), scales, zeros, (4, 48), bits, rows if axis == 0 else columns, axis)
    again = uqff.deserialize(uqff.serialize(weight)).weight
    assert again == weight
    assert again.dequantize().numpy().tobytes() == by_definition(weight).tobytes()


def test_every_parameter_is_kept() -> None:
    """Steps, rounding and channel-wise do not change the numbers, and are not lost; 0 steps are None."""
    head = header(2) + b"\0" + record("U8", (1, 1), b"\5") + record("F32", (1, 1), f32(1)) * 2
    for steps, rounded, channels in [(0, 0, 0), (20, 1, 0), (2**32 - 1, 0, 1)]:
        blob = head + u32(1, 1) + b"\x08" + u32(1) + b"\0" + u32(steps) + bytes([rounded, channels])
        weight = uqff.deserialize(blob).weight
        assert isinstance(weight, HQQ)
        assert weight.optimization_steps == (steps or None)
        assert (weight.round_zeros, weight.channel_wise) == (bool(rounded), bool(channels))
        assert uqff.serialize(weight) == blob


SCALE = record("F32", (1, 2), f32(1, 2))


def blob(w_q: bytes = b"", scales: bytes = SCALE, zeros: bytes = SCALE, **changed: object) -> bytes:
    """A sound [2, 4] blob of 4 bits in groups of 4, with parts replaced."""
    parts = {"shape": u32(2, 2, 4), "bits": b"\4", "group": u32(4), "axis": b"\0", "steps": u32(9), "flags": b"\0\1"}
    tail = b"".join({**parts, **changed}.values())  # type: ignore[arg-type]
    return header(2) + b"\0" + (w_q or record("U8", (2, 2), run(4))) + scales + zeros + tail


def test_near_miss_parses() -> None:
    """The blob that the broken ones below differ from in one part."""
    assert uqff.deserialize(blob()).weight.shape == (2, 4)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (blob(w_q=record("I32", (2, 2), run(16))), "w_q.dtype"),
        (blob(w_q=record("U8", (4,), run(4))), "w_q.shape"),
        (blob(w_q=record("U8", (2, 2, 1), run(4))), "w_q.shape"),
        (blob(w_q=record("U8", (4, 1), run(4))), "w_q.shape"),
        (blob(scales=record("F64", (1, 2), run(16))), "scales.dtype"),
        (blob(scales=record("F32", (2, 1), run(8))), "scales.shape"),
        (blob(scales=record("F32", (2,), run(8))), "scales.shape"),
        (blob(scales=record("F32", (), run(4))), "scales.shape"),
        (blob(zeros=record("F16", (1, 2), run(4))), "zeros.dtype"),
        (blob(zeros=record("F32", (1, 1), run(4))), "zeros.shape"),
        (blob(shape=u32(0)), "ndim"),
        (blob(shape=u32(9, *[1] * 9)), "ndim"),
        (blob(shape=u32(2, 0, 4)), "shape"),
        (blob(shape=u32(2, 2, 5)), "group_size"),
        (blob(shape=u32(2, 2, 8)), "w_q.shape"),
        (blob(bits=b"\5"), "bits"),
        (blob(bits=b"\0"), "bits"),
        (blob(bits=b"\2"), "w_q.shape"),
        (blob(bits=b"\3"), "w_q.dtype"),
        (blob(bits=b"\1"), "w_q.shape"),
        (blob(group=u32(0)), "group_size"),
        (blob(group=u32(3)), "group_size"),
        (blob(axis=b"\2"), "axis"),
        (blob(flags=b"\2\1"), "round_zeros"),
        (blob(flags=b"\0\2"), "channel_wise"),
    ],
)
def test_broken_rules(data: bytes, field: str) -> None:
    """Each rule, and the field that it blames at its place."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(data)
    assert caught.value.field == field
    places = {f.path: f.offset for f in trace(blob())}
    if field.startswith("w_q"):
        assert caught.value.offset is not None
    elif data[: places["ndim"]] == blob()[: places["ndim"]] and field in places:
        assert caught.value.offset == places[field]


def test_inconsistent_record_is_not_written() -> None:
    """The rules hold in both directions."""
    scales = random_tensor(1, DType.F32, (1, 2))
    for wrong in (
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 5), 4, 4),
        HQQ(random_bytes(1, (2, 3)), scales, scales, (2, 4), 4, 4),
        HQQ(random_bytes(1, (2, 2)), scales, scales.T, (2, 4), 4, 4),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 5, 4),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 4, 0),
        HQQ(random_bytes(1, (4,)), scales, scales, (2, 4), 4, 4),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 4, 2**33),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 4, 4, 2),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 4, 4, optimization_steps=2**32),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2, 4), 4, 4, optimization_steps=-1),
        HQQ(random_bytes(1, (2, 2)), scales, scales, (2**32, 4), 4, 4),
    ):
        with pytest.raises(FormatError):
            uqff.serialize(wrong)
