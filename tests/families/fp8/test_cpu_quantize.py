"""The FP8 kernel gives the reference's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.quantize_inputs import assert_same, weights
from uqff.families.fp8 import cpu as kernel
from uqff.families.fp8 import reference


def test_equals_reference() -> None:
    for name, w in weights().items():
        before = w.copy()
        assert_same(kernel.quantize(w), reference.quantize(w), name)
        assert w.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("largest", [1.0, 416.0, 1e-3, 3e38])
def test_every_bf16(largest: float) -> None:
    """All bfloat16 values up to the largest, on both sides of the ties of both roundings."""
    bits = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    x = bits.reshape(-1).view(np.float32)
    w = np.append(x[np.abs(x) <= np.float32(largest)], np.float32(largest))
    assert_same(kernel.quantize(w), reference.quantize(w), str(largest))


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    assert_same(kernel.quantize(w), reference.quantize(w), str(shape))


def test_threads_change_nothing() -> None:
    """Also the largest magnitude, wherever it is."""
    w = np.random.default_rng(3).standard_normal(kernel.GRAIN * 3 + 5, dtype=np.float32)
    w[-1] = -9
    expected = kernel.quantize(w, threads=1)
    assert_same(kernel.quantize(w, threads=3), expected, "3 threads")
    assert_same(expected, reference.quantize(w), "1 thread")
