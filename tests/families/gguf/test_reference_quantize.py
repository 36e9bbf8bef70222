"""The reference quantisers on blocks small enough to work out by hand, and on the edges of the engine's arithmetic."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest

from uqff.families.gguf.reference_quantize import QUANTIZERS, quantize_q8k
from uqff.families.gguf.search import nearest_int, round_half_away, saturate

F32 = npt.NDArray[np.float32]

TYPE_SIZES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 36),
    "Q2K": (256, 84),
    "Q3K": (256, 110),
    "Q4K": (256, 144),
    "Q5K": (256, 176),
    "Q6K": (256, 210),
    "Q8K": (256, 292),
}


def f16(value: float) -> bytes:
    return struct.pack("<e", value)


def block(size: int, elements: dict[int, float]) -> F32:
    """One block, zero but for ``elements``."""
    x = np.zeros((1, size), np.float32)
    for index, value in elements.items():
        x[0, index] = value
    return x


def quantized(name: str, x: F32) -> bytes:
    return QUANTIZERS[name](x).tobytes()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_block_and_type_sizes_are_the_formats(name: str) -> None:
    block_size, type_size = TYPE_SIZES[name]
    for count in (0, 1, 3):
        result = QUANTIZERS[name](np.ones((count, block_size), np.float32))
        assert result.shape == (count, type_size)
        assert result.dtype == np.uint8


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("wrong", ["dtype", "size", "rank"])
def test_anything_but_float32_blocks_is_refused(name: str, wrong: str) -> None:
    block_size, _ = TYPE_SIZES[name]
    x = {
        "dtype": np.zeros((1, block_size)),
        "size": np.zeros((1, block_size + 1), np.float32),
        "rank": np.zeros(block_size, np.float32),
    }[wrong]
    with pytest.raises(ValueError, match="expected float32"):
        QUANTIZERS[name](x)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_source_is_not_modified(name: str) -> None:
    block_size, _ = TYPE_SIZES[name]
    x = np.linspace(-1, 1, 2 * block_size, dtype=np.float32).reshape(2, block_size)
    before = x.copy()
    QUANTIZERS[name](x)
    np.testing.assert_array_equal(x, before)


def test_q4_0_makes_the_largest_magnitude_code_0() -> None:
    """M = -8, so d = 1 and q = x + 8: 0 for element 0, 15 for the last, 8 for zero; element j low, 16 + j high."""
    x = block(32, {0: -8.0, 1: 3.0, 16: 1.0, 31: 7.0})
    assert quantized("Q4_0", x) == f16(1.0) + bytes([9 << 4 | 0, 8 << 4 | 11]) + bytes([0x88] * 13) + bytes([0xF8])


def test_q4_0_takes_the_first_of_two_equal_magnitudes() -> None:
    """+8 comes before -8, so d = -1 and +8 is code 0; -8 would be 16 and saturates to 15."""
    x = block(32, {2: 8.0, 3: -8.0})
    assert quantized("Q4_0", x) == f16(-1.0) + bytes([0x88, 0x88, 0x80, 0x8F]) + bytes([0x88] * 12)


def test_q4_0_of_zeros_has_a_negative_zero_scale() -> None:
    assert quantized("Q4_0", block(32, {})) == bytes([0x00, 0x80]) + bytes([0x88] * 16)


def test_q4_0_rounds_a_tie_up() -> None:
    """trunc(x + 8.5) with d = 1: 0.5 goes to 9, -0.5 to 8."""
    x = block(32, {0: -8.0, 1: 0.5, 2: -0.5})
    assert quantized("Q4_0", x)[2:5] == bytes([0x80, 0x89, 0x88])


def test_q4_1_spreads_minimum_to_maximum_over_15_steps() -> None:
    """From -1 to 14, d = 1 and m = -1, so zero is code 1."""
    x = block(32, {0: -1.0, 15: 14.0, 16: 2.5})
    expected = f16(1.0) + f16(-1.0) + bytes([4 << 4 | 0]) + bytes([0x11] * 14) + bytes([0x1F])
    assert quantized("Q4_1", x) == expected


def test_q5_0_puts_fifth_bits_in_a_word_of_their_own() -> None:
    """M = -16, so d = 1 and q = x + 16: zero is 16, all fifth bits set but that of element 0."""
    x = block(32, {0: -16.0, 31: 15.0})
    assert quantized("Q5_0", x) == f16(1.0) + b"\xfe\xff\xff\xff" + bytes(15) + bytes([0xF0])


def test_q5_1_puts_fifth_bits_in_a_word_of_their_own() -> None:
    x = block(32, {9: 31.0, 20: 16.0})
    expected = f16(1.0) + f16(0.0) + (1 << 9 | 1 << 20).to_bytes(4, "little")
    assert quantized("Q5_1", x) == expected + bytes(9) + bytes([15]) + bytes(6)


def test_q8_0_rounds_half_away_from_zero() -> None:
    x = block(32, {0: 127.0, 1: 0.5, 2: -0.5, 3: -2.5, 4: 2.4375})
    assert quantized("Q8_0", x) == f16(1.0) + struct.pack("5b", 127, 1, -1, -3, 2) + bytes(27)


def test_q8_1_adds_the_sum_of_the_codes() -> None:
    x = block(32, {0: 127.0, 1: -3.0, 31: -4.0})
    expected = f16(1.0) + f16(120.0) + struct.pack("2b", 127, -3) + bytes(29) + struct.pack("b", -4)
    assert quantized("Q8_1", x) == expected


@pytest.mark.parametrize("extreme", [-128, -127])
def test_q8k_gives_the_largest_magnitude_the_extreme_code(extreme: int) -> None:
    """The engine changed the code, and with it every other one; +1 is the extreme, so the scale is negative."""
    x = block(256, {0: 1.0, 17: -0.5})
    data = quantize_q8k(x, extreme).tobytes()
    codes = np.frombuffer(data, np.int8, 256, 4)
    assert struct.unpack_from("<f", data)[0] == np.float32(1) / np.float32(extreme)
    assert codes.nonzero()[0].tolist() == [0, 17]
    assert (codes[0], codes[17]) == (extreme, 64)
    assert struct.unpack_from("<16h", data, 260) == (extreme, 64, *[0] * 14)


def test_q8k_knows_two_extremes_only() -> None:
    with pytest.raises(ValueError, match="expected -128 or -127, got 127"):
        quantize_q8k(block(256, {}), 127)


def test_q8k_where_the_inverse_scale_overflows() -> None:
    """-128 / 1e-38 is -inf and -inf * 0 is NaN: code 127 before candle 0.11 (a minimum drops NaN), 0 since."""
    x = block(256, {0: 1e-38})
    assert np.frombuffer(quantize_q8k(x, -128).tobytes(), np.int8, 2, 4).tolist() == [-128, 127]
    assert np.frombuffer(quantize_q8k(x, -127).tobytes(), np.int8, 2, 4).tolist() == [-128, 0]


@pytest.mark.parametrize("name", ["Q2K", "Q4K", "Q5K"])
def test_a_constant_block_has_only_zeros(name: str) -> None:
    """Whatever the constant: a sub-block of one value gets scale 0 and minimum 0."""
    assert quantized(name, np.full((1, 256), 0.25, np.float32)) == bytes(TYPE_SIZES[name][1])


def test_q4k_of_a_ramp_that_fits() -> None:
    """0..15 twice in each sub-block: scale 1 everywhere, the largest, so 63 / 63 of d = f16(1 / 63); no minimum."""
    x = np.tile(np.arange(16, dtype=np.float32), 16).reshape(1, 256)
    data = quantized("Q4K", x)
    assert data[:2] == f16(1 / 63)
    assert data[2:4] in (f16(0.0), f16(-0.0))
    assert data[4:16] == bytes([0xFF] * 4 + [0x00] * 4 + [0x0F] * 4)
    assert data[16:] == bytes([q << 4 | q for q in range(16)] * 8)


def test_q6k_of_zeros_has_a_negative_zero_scale() -> None:
    """The search of a zero sub-block leaves 0, not 32, in place of its codes."""
    assert quantized("Q6K", block(256, {})) == bytes(208) + bytes([0x00, 0x80])


def test_q3k_of_zeros() -> None:
    assert quantized("Q3K", block(256, {})) == bytes(110)


def test_round_is_half_away_from_zero_and_exact() -> None:
    """Also next to one half, where adding 0.5 would round up, and at odd integers that have no fraction any more."""
    v = np.array([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -0.49999997, 8388609.0, 1e30, np.inf], np.float32)
    expected = np.array([1, -1, 2, 3, -3, 0, 0, 8388609.0, 1e30, np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(round_half_away(v), expected)


def test_a_float_becomes_an_integer_by_truncation_that_saturates() -> None:
    v = np.array([np.nan, np.inf, -np.inf, 300.0, -1.5, 1.99], np.float32)
    assert saturate(v, 0, 255).tolist() == [0, 255, 0, 255, 0, 1]
    assert saturate(v, -128, 127).tolist() == [0, 127, -128, 127, -1, 1]
    assert nearest_int(np.array([3e9, -3e9], np.float32)).tolist() == [2**31 - 1, -(2**31)]
