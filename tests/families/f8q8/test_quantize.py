"""F8Q8 reference quantiser: by hand and against the client's files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import golden_files_v1, v1_layers
from uqff.families.f8q8.reference import quantize
from uqff.numerics.packing import e4m3_to_float32


def test_by_hand() -> None:
    """With d = 1 the scale byte is e4m3(416) = 0x7D, codes are rounded elements, ties away from zero."""
    w = np.zeros(32, np.float32)
    w[:7] = [127, -127, 0.5, -0.5, 0.49999997, 2.5, -126.5]
    assert quantize(w).tolist() == [[0x7D, 127, 0x81, 1, 0xFF, 0, 3, 0x81] + [0] * 25]


def test_codes_use_the_scale_before_its_rounding() -> None:
    """The scale d = 1.1 is stored as e4m3(457.6) = 448; 55 / d is 50 (with the stored d, 448/416, it would be 51)."""
    w = np.zeros(32, np.float32)
    w[:2] = [127 * np.float32(1.1), 55]
    assert quantize(w)[0, :3].tolist() == [0x7E, 127, 50]


def test_blocks_run_across_rows_and_the_end_is_padded() -> None:
    w = np.arange(1, 41, dtype=np.float32).reshape(2, 20)
    blocks = quantize(w)
    assert blocks.shape == (2, 33)
    assert np.array_equal(blocks, quantize(w.reshape(40)))
    assert np.array_equal(blocks[0], quantize(w.reshape(-1)[:32])[0])
    assert blocks[1, 1:].view(np.int8).tolist() == [105, 108, 111, 114, 117, 121, 124, 127] + [0] * 24


def test_zero_and_negative_zero() -> None:
    assert not quantize(np.array([0.0, -0.0] * 16, np.float32)).any()


def test_small_scales_underflow_and_large_ones_saturate() -> None:
    """Up to d * 416 = 2^-10 the scale is 0 (2^-9 is the smallest e4m3), above 448 it is 448; the codes do not care."""
    for largest, byte in [(2.98e-4, 0x00), (2.99e-4, 0x01), (137, 0x7E), (1e30, 0x7E), (3.4e38, 0x7E)]:
        w = np.full(32, largest, np.float32)
        assert quantize(w)[0].tolist() == [byte] + [127] * 32


def test_subnormal_scale() -> None:
    """1/d is infinite: codes saturate, zeros (0 * inf) give 0."""
    w = np.zeros(32, np.float32)
    w[:3] = [1e-38, -1e-39, -0.0]
    assert quantize(w)[0].tolist() == [0, 127, 0x80] + [0] * 30


@pytest.mark.parametrize("file", golden_files_v1("f8q8"))
def test_equals_client(file: str) -> None:
    for name, entries, w in v1_layers(file):
        assert int(entries["weight.format"]) == 5
        blocks = quantize(w)
        assert int(entries["weight.num_blocks"]) == len(blocks), name
        assert tuple(entries["weight.shape"].tolist()) == w.shape, name
        assert blocks.tobytes() == entries["weight"].tobytes(), name


@given(st.integers(0, 2**32), st.integers(-8, 4))
def test_within_half_a_step(seed: int, exponent: int) -> None:
    """Each element is within half a d of code * d, and the stored d within the 2^-4 of e4m3 of the true one."""
    w = np.random.default_rng(seed).standard_normal((3, 32)).astype(np.float32) * np.float32(2.0**exponent)
    blocks = quantize(w)
    d = np.abs(w).max(-1, keepdims=True).astype(np.float64) / 127
    codes = blocks[:, 1:].view(np.int8)
    assert (np.abs(codes * d - w) <= d * (0.5 + 1e-4)).all()
    assert (np.abs(codes).max(-1) == 127).all()
    stored = e4m3_to_float32(blocks[:, :1]) / 416.0
    assert (np.abs(stored - d) <= np.maximum(d / 16, 2.0**-10 / 416)).all()
