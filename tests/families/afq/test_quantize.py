"""AFQ reference quantiser: by hand, against the client's files, and its packing against MLX."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import Blob, golden_files, v0_layers
from uqff.families.afq.reference import cast, quantize
from uqff.numerics.packing import unpack_row

LOAD_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def test_by_hand() -> None:
    """0..31 in 2 bits: scale 31/3; 5.1666 is the tie between codes 0 and 1, so 5 is 0, 6 is 1; 15 is 1, 16 is 2."""
    packed, scales, biases = quantize(np.arange(32, dtype=np.float32), 2, 32)
    assert (scales.tolist(), biases.tolist()) == ([np.float32(31 / 3)], [0.0])
    expected = [0] * 6 + [1] * 10 + [2] * 10 + [3] * 6
    assert packed.tolist() == [sum(expected[4 * k + j] << (2 * j) for j in range(4)) for k in range(8)]


def test_ties_go_away_from_zero() -> None:
    """Scale 2 exactly (range 6, 2 bits): 1, 3 and 5 are ties and go up."""
    w = np.zeros(32, np.float32)
    w[:7] = range(7)
    packed, scales, _ = quantize(w, 2, 32)
    assert scales.tolist() == [2.0]
    assert unpack_row(packed, 2)[:7].tolist() == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("span", "scale"), [(0.0, 1.0), (9e-13, 1.0), (1e-12, np.float32(1e-12) / np.float32(15))])
def test_flat_groups(span: float, scale: float) -> None:
    """Below a range of 1e-12 (not at it) the scale is 1 and every code 0."""
    w = np.zeros(64, np.float32)
    w[3] = span
    packed, scales, biases = quantize(w, 4, 64)
    assert (scales.tolist(), biases.tolist()) == ([np.float32(scale)], [0.0])
    assert packed.any() == (span >= 1e-12)


def test_negative_zero_bias_becomes_positive() -> None:
    _, scales, biases = quantize(np.full(64, -0.0, np.float32), 4, 64)
    assert scales.tolist() == [1.0]
    assert not np.signbit(biases).any()


def test_range_beyond_float32() -> None:
    """The engine's Rust casts NaN to 0 and divides by an infinite scale: all codes are 0."""
    w = np.zeros(64, np.float32)
    w[:2] = [3e38, -3e38]
    packed, scales, biases = quantize(w, 4, 64)
    assert not packed.any()
    assert (scales.tolist(), biases.tolist()) == ([np.inf], [np.float32(-3e38)])


def test_groups_are_cut_from_the_last_dimension() -> None:
    w = np.arange(2 * 3 * 128, dtype=np.float32).reshape(2, 3, 128)
    packed, scales, biases = quantize(w, 3, 64)
    assert (packed.shape, scales.shape, biases.shape) == ((2, 3, 48), (2, 3, 2), (2, 3, 2))
    assert biases.tolist() == w[..., ::64].tolist()


def test_cast_rounds_to_nearest_even() -> None:
    """1 + 2^-11 and 1 + 2^-8 are ties of float16 and of bfloat16."""
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert cast(values, "float16").tolist()[:2] == [0x3C00, 0x3C02]
    assert cast(values, "bfloat16").tolist()[2:] == [0x3F80, 0x3F82]
    assert cast(values, "float32") is values


@pytest.mark.parametrize("file", [*golden_files("afq"), "v0/llama-mixed-f32/q8_0-0.uqff"])
def test_equals_client(file: str) -> None:
    """Codes and scales to the bit; biases as floats (see the module for the sign of their zeros)."""
    layers = 0
    for name, data, w, dtype in v0_layers(file):
        blob = Blob(data)
        _, family, _ = blob.take("IBB")
        if family != 4:
            continue
        layers += 1
        stored, stored_scales, stored_biases = blob.record(), blob.record(), blob.record()
        bits, group_size = blob.take("BB")
        packed, scales, biases = quantize(w, bits, group_size)
        assert packed.view("<u4").tobytes() == stored.tobytes(), name
        assert packed.view("<u4").shape == stored.shape, name
        assert cast(scales, LOAD_DTYPES[dtype]).tobytes() == stored_scales.tobytes(), name  # type: ignore[arg-type]
        assert np.array_equal(cast(biases, LOAD_DTYPES[dtype]), stored_biases), name  # type: ignore[arg-type]
    assert layers >= 7


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_is_mlx(bits: int, group_size: int) -> None:
    """MLX's own dequantiser reads our packed words: its quantiser follows another rule, its format is the same."""
    mx = pytest.importorskip("mlx.core")
    w = np.random.default_rng(bits).standard_normal((5, 256), dtype=np.float32)
    packed, scales, biases = quantize(w, bits, group_size)
    ours = np.repeat(biases, group_size, -1) + unpack_row(packed, bits) * np.repeat(scales, group_size, -1)
    theirs = mx.dequantize(
        mx.array(packed.view("<u4")), mx.array(scales), mx.array(biases), group_size=group_size, bits=bits
    )
    assert np.array_equal(ours, np.array(theirs))


@given(st.sampled_from([2, 3, 4, 6, 8]), st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_edges_are_exact_and_the_rest_within_half_a_step(bits: int, seed: int, spread: float, centre: float) -> None:
    """The minimum has code 0, the maximum the top code, no other element is further than half a step off."""
    w = (np.random.default_rng(seed).standard_normal((2, 64)) * spread + centre).astype(np.float32)
    packed, scales, biases = quantize(w, bits, 64)
    codes = unpack_row(packed, bits)
    assert (np.take_along_axis(codes, w.argmin(-1)[:, None], -1) == 0).all()
    assert (np.take_along_axis(codes, w.argmax(-1)[:, None], -1) == 2**bits - 1).all()
    error = np.abs(codes * scales.astype(np.float64) + biases.astype(np.float64) - w)
    assert (error <= scales * (0.5 + 1e-4)).all()
