"""The MXFP4 kernel gives the reference's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.quantize_inputs import assert_same, weights
from uqff.families.mxfp4 import cpu as kernel
from uqff.families.mxfp4 import reference


def test_equals_reference() -> None:
    for name, w in weights().items():
        before = w.copy()
        assert_same(kernel.quantize(w), reference.quantize(w), name)
        assert w.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 32), (2, 3, 96), (5, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Odd and even numbers of blocks: they are taken in pairs."""
    w = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    assert_same(kernel.quantize(w), reference.quantize(w), str(shape))


def test_scale_at_every_binade_border() -> None:
    """The largest magnitudes around 6 * 2^k, where log2f may round up to k, for every k."""
    sixths = (np.arange(0, 252, dtype=np.int32) << 23)[:, None] + np.arange(-70, 3, dtype=np.int32)
    sixths = sixths[sixths > 0].view(np.float32)
    w = np.zeros((len(sixths), 32), np.float32)
    w[:, 7] = (sixths.astype(np.float64) * 6).astype(np.float32)
    assert_same(kernel.quantize(w), reference.quantize(w), "borders")


def test_thresholds() -> None:
    """Elements on both sides of each threshold, of both signs, in a block of scale 1 (largest magnitude 6)."""
    near = (reference.THRESHOLDS.view(np.int32)[:, None] + np.arange(-1, 2, dtype=np.int32)).view(np.float32)
    block = np.zeros(64, np.float32)
    block[:21], block[32:53], block[31], block[63] = near.reshape(-1), -near.reshape(-1), 6, 6
    expected = reference.quantize(block)
    assert_same(kernel.quantize(block), expected, "thresholds")
    assert expected[1].tolist() == [127, 127]


def test_threads_change_nothing() -> None:
    w = np.random.default_rng(3).standard_normal((3, kernel.GRAIN * 64 + 32), dtype=np.float32)
    expected = kernel.quantize(w, threads=1)
    assert_same(kernel.quantize(w, threads=3), expected, "3 threads")
    assert_same(expected, reference.quantize(w), "1 thread")
