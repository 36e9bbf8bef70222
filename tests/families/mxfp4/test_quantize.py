"""MXFP4 reference quantiser: by hand and against the client's files."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import golden_files_v1, v1_layers
from uqff.families.mxfp4.reference import floor_log2, quantize, scale_bytes


def test_by_hand() -> None:
    """Largest magnitude 6, scale 2^0. Thresholds belong to the upper code; even elements are low nibbles."""
    w = np.zeros(32, np.float32)
    w[:16] = [6, -6, 0.25, 0.2499, 0.75, -0.75, 1.25, 1.75, 2.5, 3.5, 4.9999, 5, -0.1, -0.0, 0.0, 1.0]
    codes, scales = quantize(w)
    assert scales.tolist() == [127]
    assert codes.tolist() == [0xF7, 0x01, 0xA2, 0x43, 0x65, 0x76, 0x08, 0x20] + [0] * 8


@pytest.mark.parametrize(
    ("absmax", "byte"),
    [
        (0.0, 127),
        (6.0, 127),
        (5.9999995, 126),
        (11.999999, 127),  # up to twice the largest code: clipped
        (12.0, 128),
        (3.4028235e38, 252),
        (6 * 2.0**-126, 1),
        (2.0**-126, 0),
        (1e-45, 0),  # a sixth of it is 0, its logarithm -inf
    ],
)
def test_scale(absmax: float, byte: int) -> None:
    assert scale_bytes(np.array([absmax], np.float32)).tolist() == [byte]


def test_what_is_above_six_is_clipped() -> None:
    codes, scales = quantize(np.full(32, -11.5, np.float32))
    assert (scales.tolist(), codes.tolist()) == ([127], [0xFF] * 16)


def test_sign_of_what_underflows() -> None:
    """The sign is taken after scaling: -1e-30 keeps it at scale 2^0, and is -0.0, hence code 0, at scale 2^125."""
    w = np.zeros(64, np.float32)
    w[:2], w[32:34] = [6, -1e-30], [3.4028235e38, -1e-30]
    codes, scales = quantize(w)
    assert scales.tolist() == [127, 252]
    assert codes[[0, 16]].tolist() == [0x87, 0x07]


@pytest.mark.parametrize(
    ("k", "count"),
    [
        *[(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (8, 2), (9, 5), (17, 11), (33, 22), (64, 22), (65, 44)],
        *[(127, 44), (-1, 0), (-2, 1), (-3, 1), (-4, 2), (-8, 5), (-16, 11), (-32, 22), (-64, 44), (-125, 44)],
        (-126, 22),
    ],
)
def test_logarithm_rounds_up_just_below_powers_of_two(k: int, count: int) -> None:
    """At n ulps below 2^k the logarithm is n * 2^-24 / ln 2 lower, and k once that is under half its own ulp."""
    power = np.float32(2.0**k)
    below = (power.view(np.int32) - np.arange(100, 0, -1, dtype=np.int32)).view(np.float32)
    assert (floor_log2(below) == k).sum() == count
    assert (np.diff(floor_log2(below)) >= 0).all()
    assert floor_log2(np.array([power], np.float32)).tolist() == [k]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's log2f")
def test_logarithm_is_glibc() -> None:
    """Around every power of two; elsewhere the floor cannot depend on the last bit."""
    log2f = ctypes.CDLL("libm.so.6").log2f
    log2f.argtypes, log2f.restype = [ctypes.c_float], ctypes.c_float
    near = (np.arange(1, 255, dtype=np.int32) << 23)[:, None] + np.arange(-50, 3, dtype=np.int32)
    x = np.concatenate([near.reshape(-1), 1 << np.arange(23, dtype=np.int32)]).view(np.float32)
    assert floor_log2(x).tolist() == [np.floor(log2f(v)) for v in x]


@pytest.mark.parametrize("file", golden_files_v1("mxfp4"))
def test_equals_client(file: str) -> None:
    for name, entries, w in v1_layers(file):
        assert int(entries["weight.format"]) == 6
        codes, scales = quantize(w)
        assert codes.tobytes() == entries["weight"].tobytes(), name
        assert scales.tobytes() == entries["weight.scales"].tobytes(), name
        assert (codes.shape, scales.shape) == (entries["weight"].shape, entries["weight.scales"].shape)


@given(st.integers(0, 2**32), st.integers(-2, 2))
def test_a_power_of_two_moves_only_the_scale(seed: int, exponent: int) -> None:
    w = np.random.default_rng(seed).standard_normal((2, 3, 64)).astype(np.float32)
    codes, scales = quantize(w)
    moved_codes, moved_scales = quantize(w * np.float32(2.0**exponent))
    assert np.array_equal(moved_codes, codes)
    assert np.array_equal(moved_scales, scales.astype(np.int32) + exponent)
