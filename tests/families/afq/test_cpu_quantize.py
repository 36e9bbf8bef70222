"""The AFQ kernel gives the reference's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.quantize_inputs import assert_same, weights
from uqff.families.afq import cpu as kernel
from uqff.families.afq import reference

KINDS = [(bits, 64) for bits in (2, 3, 4, 6, 8)] + [(3, 32), (4, 32), (4, 128), (6, 128)]


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_equals_reference(bits: int, group_size: int) -> None:
    for name, w in weights().items():
        before = w.copy()
        assert_same(kernel.quantize(w, bits, group_size), reference.quantize(w, bits, group_size), name)
        assert w.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 128), (7, 192)])
def test_shapes(shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    assert_same(kernel.quantize(w, 3, 64), reference.quantize(w, 3, 64), str(shape))


def test_threads_change_nothing() -> None:
    w = np.random.default_rng(3).standard_normal((9, kernel.GRAIN * 16), dtype=np.float32)
    expected = kernel.quantize(w, 4, 64, threads=1)
    assert_same(kernel.quantize(w, 4, 64, threads=3), expected, "3 threads")
    assert_same(expected, reference.quantize(w, 4, 64), "1 thread")
