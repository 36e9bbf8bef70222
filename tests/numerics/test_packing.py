"""Narrow floats against torch and exact arithmetic; packed codes against the definition and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uqff.numerics.packing import (
    bf16_to_float32,
    e4m3_to_float32,
    f16_to_float32,
    float32_to_bf16,
    float32_to_e4m3,
    float32_to_f16,
    pack_planes,
    pack_row,
    round_half_away,
    unpack_planes,
    unpack_row,
)

torch = pytest.importorskip("torch")


def float32s(count: int = 200_000) -> np.ndarray:
    """Every kind of float32 but NaN: random bits, and the neighbours of what the narrow types can just not hold."""
    random = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    corners = np.array([0, 0x80000000, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000], np.uint32)
    narrow = np.arange(2**16, dtype=np.uint32) << 16
    around = (narrow[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    half_ties = (halves[:, None] + np.array([-1, 0, 1], np.int64) + 0x1000).astype(np.uint32).reshape(-1)
    bits = np.concatenate([random, corners, around, half_ties])
    floats = bits.view(np.float32)
    return floats[~np.isnan(floats)]


def test_round_half_away() -> None:
    """Against float64, where adding a half is exact; beyond 2^23 every float32 is whole."""
    whole = np.arange(-300, 300, dtype=np.float32)
    ties = np.concatenate([whole + np.float32(0.5), whole * np.float32(1 / 64)])
    near = (ties.view(np.int32)[:, None] + np.arange(-3, 4)).astype(np.int32).reshape(-1).view(np.float32)
    x = np.concatenate(
        [near, np.array([0.49999997, -0.49999997, 8388607.5, -8388609.0, 16777215.0, 3e38, -0.0, 0.0], np.float32)]
    )
    expected = np.copysign(np.floor(np.abs(x.astype(np.float64)) + 0.5), x).astype(np.float32)
    assert round_half_away(x).tobytes() == expected.tobytes()


def test_bf16_equals_torch() -> None:
    x = float32s()
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(float32_to_bf16(x), expected)
    back = torch.from_numpy(expected.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert bf16_to_float32(expected).tobytes() == back.tobytes()


def test_bf16_of_nan_is_nan() -> None:
    """A NaN whose payload is all in the low bits must not become infinity."""
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert float32_to_bf16(nans).tolist() == [0x7FC0, 0xFFC0, 0x7FFF, 0x7FC0]


def test_f16_equals_torch() -> None:
    x = float32s()
    expected = torch.from_numpy(x).to(torch.float16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(float32_to_f16(x), expected)
    values = f16_to_float32(expected)
    assert values.tobytes() == torch.from_numpy(expected.view(np.int16)).view(torch.float16).float().numpy().tobytes()


def test_e4m3_equals_torch() -> None:
    """Within 448, and on both sides of every midpoint; torch turns larger numbers into NaN."""
    finite = e4m3_to_float32(np.arange(0x7F, dtype=np.uint8))
    midpoints = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    near = (midpoints.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).reshape(-1).view(np.float32)
    x = np.concatenate([float32s(), near, -near])
    x = x[np.abs(x) <= 448]
    assert len(x) > 100_000
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(float32_to_e4m3(x), expected)


def test_e4m3_saturates_and_keeps_nan() -> None:
    x = np.array([448, 449, 464, 480, 3e38, np.inf, -np.inf, -465], np.float32)
    assert float32_to_e4m3(x).tolist() == [0x7E] * 6 + [0xFE] * 2
    assert float32_to_e4m3(np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)).tolist() == [0x7F, 0xFF]


def test_e4m3_values_equal_torch() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3_to_float32(codes), expected, equal_nan=True)
    assert np.array_equal(np.signbit(e4m3_to_float32(codes[:255])), np.signbit(expected[:255]))


def test_conversions_keep_the_shape() -> None:
    for shape in [(), (1,), (2, 3), (0,)]:
        x = np.ones(shape, np.float32)
        assert float32_to_bf16(x).shape == float32_to_f16(x).shape == float32_to_e4m3(x).shape == shape
        assert round_half_away(x).shape == bf16_to_float32(float32_to_bf16(x)).shape == shape


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (8, [0x12, 0xFE], [0x12, 0xFE]),
        (4, [0x1, 0x2, 0xF, 0x0], [0x21, 0x0F]),
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (3, [0b001, 0b010, 0b111, 0b100, 0b000, 0b101, 0b110, 0b011], [0b11_010_001, 0b1_000_100_1, 0b011_110_10]),
        (6, [0b000001, 0b111111, 0b100000, 0b010101], [0b11_000001, 0b0000_1111, 0b010101_10]),
    ],
)
def test_pack_row_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_row(np.array(codes, np.uint8), bits).tolist() == packed
    assert unpack_row(np.array(packed, np.uint8), bits).tolist() == codes


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_pack_row_is_one_number(bits: int, eights: int, rows: int, random: object) -> None:
    """A row is the little-endian number whose digit j, in base 2^bits, is code j."""
    codes = [[random.randrange(2**bits) for _ in range(8 * eights)] for _ in range(rows)]  # type: ignore[attr-defined]
    packed = pack_row(np.array(codes, np.uint8), bits)
    for row, number in zip(codes, packed, strict=True):
        assert int.from_bytes(number.tobytes(), "little") == sum(code << (j * bits) for j, code in enumerate(row))
    assert unpack_row(packed, bits).tolist() == codes


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (8, [0x12, 0x34], [0x12, 0x34]),
        (4, [0x1, 0x2, 0x3, 0x4], [0x13, 0x24]),
        (2, [0, 1, 2, 3], [0b00_01_10_11]),
        (1, [1, 0, 0, 0, 0, 0, 1, 1], [0b10000011]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 1, 2], [0o1234567012]),
        (3, [1, 2], [0o1200000000]),
        (3, list(range(8)) + [7] * 12, [0o0246777777, 0o1357777777]),
    ],
)
def test_pack_planes_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    """The first plane in the high bits; 3-bit rows padded to tens. Octal digits are 3-bit codes."""
    column = np.array(codes, np.uint8)[:, None]
    result = pack_planes(column, bits)
    assert result[:, 0].tolist() == packed
    assert result.dtype == (np.int32 if bits == 3 else np.uint8)
    unpacked = unpack_planes(result, bits)[:, 0].tolist()
    assert unpacked[: len(codes)] == codes
    assert not any(unpacked[len(codes) :])


def test_pack_planes_leaves_its_input_alone() -> None:
    codes = np.arange(8, dtype=np.uint8).reshape(4, 2)
    pack_planes(codes, 8)[:] = 0
    pack_planes(codes, 4)[:] = 0
    assert codes.reshape(-1).tolist() == list(range(8))


def test_pack_planes_refuses_unequal_planes() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 2 rows for 4-bit planes, got 3"):
        pack_planes(np.zeros((3, 1), np.uint8), 4)


@given(st.sampled_from([8, 4, 3, 2, 1]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32))
def test_pack_planes_round_trip(bits: int, runs: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (8 * runs, columns)).astype(np.uint8)
    assert np.array_equal(unpack_planes(pack_planes(codes, bits), bits)[: len(codes)], codes)
