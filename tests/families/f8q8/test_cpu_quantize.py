"""The F8Q8 kernel gives the reference's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.quantize_inputs import assert_same, weights
from uqff.families.f8q8 import cpu as kernel
from uqff.families.f8q8 import reference


def test_equals_reference() -> None:
    for name, w in weights().items():
        before = w.copy()
        assert_same(kernel.quantize(w), reference.quantize(w), name)
        assert w.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 129])
def test_sizes(size: int) -> None:
    """Blocks are taken in pairs, and the last one is padded: every way to end."""
    w = np.random.default_rng(size).standard_normal(size, dtype=np.float32)
    assert_same(kernel.quantize(w), reference.quantize(w), str(size))


def test_rounding_of_every_tie() -> None:
    """Products on both sides of each k + 1/2: d is 1, so that codes are the rounded elements."""
    ties = np.arange(-126.5, 127, dtype=np.float32)
    near = (ties.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).reshape(-1).view(np.float32)
    blocks = np.concatenate([near, np.zeros(-len(near) % 31, np.float32)]).reshape(-1, 31)
    w = np.concatenate([np.full((len(blocks), 1), 127, np.float32), blocks], axis=-1)
    assert_same(kernel.quantize(w), reference.quantize(w), "ties")


def test_threads_change_nothing() -> None:
    w = np.random.default_rng(3).standard_normal(kernel.GRAIN * 64 * 3 + 70, dtype=np.float32)
    expected = kernel.quantize(w, threads=1)
    assert_same(kernel.quantize(w, threads=3), expected, "3 threads")
    assert_same(expected, reference.quantize(w), "1 thread")
