"""AFQ: packing by hand for every width, against MLX, and the rules of shapes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import afq, f32, header, record, run
from tests.support.strategies import random_bytes, random_tensor
from uqff import DType, FormatError
from uqff.families import AFQ
from uqff.families.afq.reference import unpack_stream

BITS = [2, 3, 4, 6, 8]
GROUPS = [32, 64, 128]


@pytest.mark.parametrize(
    ("bits", "packed", "codes"),
    [
        (2, [0b11_10_01_00], [0, 1, 2, 3]),
        (3, [0b10_001_000, 0b1_100_011_0, 0b111_110_10], [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, [0x21, 0x43], [1, 2, 3, 4]),
        (6, [0b01_111110, 0b1000_0100, 0b101010_01], [62, 17, 24, 42]),
        (8, [0, 7, 255], [0, 7, 255]),
    ],
)
def test_bit_stream_by_hand(bits: int, packed: list[int], codes: list[int]) -> None:
    """Code j occupies bits j*b to j*b + b - 1 of the row; 3 and 6 bits cross bytes."""
    assert unpack_stream(torch.tensor(packed, dtype=torch.uint8), bits).tolist() == codes


def test_group_by_hand() -> None:
    """``q * scale + bias``, a scale and a bias for each group of a row."""
    words = np.array([[0xFEDCBA98_76543210] * 2 + [0x11111111_11111111] * 2], "<u8")
    blob = afq(
        4,
        32,
        record("U32", (1, 8), words.tobytes()),
        record("F32", (1, 2), f32(0.5, 2)),
        record("F32", (1, 2), f32(-1, 3)),
    )
    weight = uqff.deserialize(blob).weight
    expected = [0.5 * (element % 16) - 1 for element in range(32)] + [2.0 * 1 + 3] * 32
    assert weight.dequantize().tolist() == [expected]
    assert (weight.kind, weight.shape, weight.nbytes) == ("afq4", (1, 64), 32 + 8 + 8)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_random_codes_against_mlx(bits: int, group_size: int, shape: tuple[int, ...]) -> None:
    """Bit-equal to an implementation by others, with F32 scales."""
    rng = np.random.default_rng(bits * group_size)
    w_q = rng.integers(0, 2**32, (*shape, 3 * group_size * bits // 32), np.uint32)
    scales, biases = (rng.normal(size=(*shape, 3)).astype(np.float32) for _ in range(2))
    theirs = np.array(
        mx.dequantize(mx.array(w_q), mx.array(scales), mx.array(biases), group_size=group_size, bits=bits)
    )
    weight = AFQ(
        torch.from_numpy(w_q.view(np.uint8)), torch.from_numpy(scales), torch.from_numpy(biases), bits, group_size
    )
    again = uqff.deserialize(uqff.serialize(weight)).weight
    assert again == weight
    assert again.shape == (*shape, 3 * group_size)
    assert again.dequantize().numpy().tobytes() == theirs.tobytes()
    assert again._dequantize().numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_narrow_scales_are_widened_first(dtype: DType) -> None:
    """All arithmetic is float32, whatever the scales are stored in."""
    scales, biases = (torch.randn(4, 2).to(dtype.torch) for _ in range(2))
    weight = AFQ(random_bytes(1, (4, 32)), scales, biases, 4, 32)
    wide = AFQ(weight.w_q, weight.scales.float(), weight.biases.float(), 4, 32)
    assert torch.equal(weight.dequantize(), wide.dequantize())


ROW = record("U32", (2, 4), run(32))
PART = record("F32", (2, 1), f32(1, 2))


@pytest.mark.parametrize(
    ("blob", "field"),
    [
        (afq(4, 32, record("U8", (2, 16), run(32)), PART, PART), "w_q.dtype"),
        (afq(4, 32, record("U32", (), run(4)), PART, PART), "w_q.ndim"),
        (afq(4, 32, record("U32", (2, 5), run(40)), PART, PART), "w_q.shape"),
        (afq(4, 32, ROW, record("F64", (2, 1), run(16)), PART), "scales.dtype"),
        (afq(4, 32, ROW, PART, record("F16", (2, 1), run(4))), "biases.dtype"),
        (afq(4, 32, ROW, record("F32", (2,), f32(1, 2)), PART), "scales.shape"),
        (afq(4, 32, ROW, record("F32", (), f32(1)), PART), "scales.shape"),
        (afq(4, 32, ROW, PART, record("F32", (1, 2), f32(1, 2))), "biases.shape"),
        (afq(4, 64, ROW, PART, PART), "w_q.shape"),
        (afq(2, 32, ROW, PART, PART), "scales.shape"),
        (afq(5, 32, ROW, PART, PART), "bits"),
        (afq(40, 32, ROW, PART, PART), "bits"),
        (afq(4, 16, ROW, PART, PART), "group_size"),
        (afq(4, 0, ROW, PART, PART), "group_size"),
    ],
)
def test_broken_rules(blob: bytes, field: str) -> None:
    """Each rule, and the field that it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(blob)
    assert caught.value.field == field
    assert caught.value.offset is not None


def test_near_misses_parse() -> None:
    """The blobs that the broken ones differ from in one part."""
    assert uqff.deserialize(afq(4, 32, ROW, PART, PART)).weight.shape == (2, 32)
    assert uqff.deserialize(afq(2, 64, ROW, PART, PART)).weight.shape == (2, 64)
    one = record("F32", (1,), f32(1))
    assert uqff.deserialize(afq(4, 32, record("U32", (4,), run(16)), one, one)).weight.shape == (32,)


def test_inconsistent_record_is_not_written() -> None:
    """The rules hold in both directions."""
    part = random_tensor(1, DType.F32, (2, 1))
    for wrong in (
        AFQ(random_bytes(1, (2, 17)), part, part, 4, 32),
        AFQ(random_bytes(1, (2, 18)), part, part, 4, 32),
        AFQ(random_bytes(1, (2, 16)), part, part.half(), 4, 32),
        AFQ(random_bytes(1, (2, 16)), part, part, 7, 32),
        AFQ(random_bytes(1, (2, 16)), part, part, 4, 48),
        AFQ(random_bytes(1, (3, 16)), part, part, 4, 32),
    ):
        with pytest.raises(FormatError):
            uqff.serialize(wrong)


def test_unaligned_scales_are_copied_each_time_they_are_asked_for() -> None:
    """A part at an odd address stays a view of the file until somebody wants numbers."""
    blob = afq(4, 32, ROW, PART, PART)
    for shift in range(4):
        weight = uqff.deserialize(memoryview(bytes(shift) + blob)[shift:]).weight
        assert isinstance(weight, AFQ)
        assert weight.scales.tolist() == [[1.0], [2.0]]
        assert weight.scales.data_ptr() % 4 == 0
        assert weight.nbytes == 32 + 8 + 8
    assert header(4) == blob[:5]
