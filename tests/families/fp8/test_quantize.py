"""FP8 reference quantiser: by hand and against the client's files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import Blob, golden_files, v0_layers
from uqff.families.fp8.reference import quantize, quantizing_scale
from uqff.numerics.packing import bf16_to_float32, e4m3_to_float32, float32_to_bf16


def test_by_hand() -> None:
    """Scale 416: 1 becomes 416 = 0x7D, 0.5 becomes 208 = 0x75, 1/256 becomes 1.625 = 0x3D, tiny ones signed zeros."""
    codes, dequant_scale, scale = quantize(np.array([1, -1, 0.5, 1 / 256, 1e-9, -1e-9, 0, -0.0], np.float32))
    assert codes.tolist() == [0x7D, 0xFD, 0x75, 0x3D, 0x00, 0x80, 0x00, 0x80]
    assert scale == 416
    assert dequant_scale.view(np.uint32) == 0x3B1D89D9


@pytest.mark.parametrize(
    ("absmax", "scale"),
    [
        (0.0, 416),  # 1/0, clamped
        (1e-30, 416),
        (1.0, 416),
        (2.0, 208),
        (3.0, 139),  # bf16(1/3) is 0.333984375; times 416 is 138.9375, and 139 the nearest bfloat16
        (448.0, 0.92578125),  # bf16(1/448) * 416 is 0.92676, and this the nearest; nearest to 416/448 is 0.9296875
    ],
)
def test_scale_is_computed_in_bf16(absmax: float, scale: float) -> None:
    assert quantizing_scale(np.float32(absmax)) == np.float32(scale)


def test_weights_are_rounded_to_bf16_first() -> None:
    """1 + 2^-8 is a tie in bfloat16 and becomes 1, so that nothing is above 1 and the scale stays 416."""
    codes, _, scale = quantize(np.array([1 + 2**-8, 0.25], np.float32))
    assert scale == 416
    assert codes.tolist() == [0x7D, 0x6D]


def test_product_is_rounded_to_bf16_before_e4m3() -> None:
    """0.0703125 * 416 = 29.25 fits; 0.0356 in bfloat16, 0.035645, gives 14.828 -> bf16 14.8125 -> e4m3 15."""
    w = np.array([0.0703125, 0.0356], np.float32)
    codes, _, scale = quantize(w)
    product = bf16_to_float32(float32_to_bf16(bf16_to_float32(float32_to_bf16(w)) * scale))
    assert product.tolist() == [29.25, 14.8125]
    assert e4m3_to_float32(codes).tolist() == [30, 15]


def test_infinite_in_bf16() -> None:
    """The largest float32 rounds to infinity: the scale is 0, its own code NaN, all others zeros."""
    codes, dequant_scale, scale = quantize(np.array([3.4028235e38, -5, 5], np.float32))
    assert codes.tolist() == [0xFF, 0x80, 0x00]
    assert scale == 0
    assert dequant_scale == np.inf


@pytest.mark.parametrize("file", golden_files("fp8"))
def test_equals_client(file: str) -> None:
    for name, data, w, _ in v0_layers(file):
        blob = Blob(data)
        _, family, _ = blob.take("IBB")
        assert family == 3
        stored = blob.record()
        dequant_w_scale, dequant_x_scale, quant_scale, dtype = blob.take("fffI")
        codes, dequant_scale, scale = quantize(w)
        assert codes.tobytes() == stored.tobytes(), name
        assert (dequant_scale, dequant_scale, scale) == (dequant_w_scale, dequant_x_scale, quant_scale), name
        assert dtype == 9


@given(st.integers(0, 2**32), st.integers(-20, 20))
def test_magnitudes_keep_their_order(seed: int, exponent: int) -> None:
    """A larger weight never has a smaller code, and negation changes the sign bit alone."""
    w = np.sort(np.random.default_rng(seed).standard_normal(64)).astype(np.float32) * np.float32(2.0**exponent)
    codes, _, _ = quantize(w)
    assert (np.diff(e4m3_to_float32(codes)) >= 0).all()
    assert np.array_equal(quantize(-w)[0], codes ^ 0x80)
