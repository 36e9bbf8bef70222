"""The HQQ kernel gives the reference's bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.quantize_inputs import assert_same, weights
from uqff.families.hqq import cpu as kernel
from uqff.families.hqq import reference
from uqff.numerics import glibc as libm
from uqff.simd.libm import expf, logf


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_equals_reference(bits: int) -> None:
    for name, w in weights().items():
        before = w.copy()
        assert_same(kernel.quantize(w, bits), reference.quantize(w, bits), name)
        assert w.tobytes() == before.tobytes(), name


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((64, 1), 64), ((3, 64), 64), ((9, 8), 8), ((11, 40), 40), ((2, 3, 64), 64), ((64, 1025), 64), ((16, 7), 16)],
)
def test_shapes(shape: tuple[int, ...], group_size: int) -> None:
    """Strips of columns that are not full, and numbers of elements that are not a multiple of the 32 running sums."""
    w = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    for steps in (1, 3, 20):
        assert_same(kernel.quantize(w, 4, group_size, steps), reference.quantize(w, 4, group_size, steps), str(steps))


def test_threads_change_nothing() -> None:
    """The error that ends the optimisation is summed across all threads' columns, in one order."""
    w = np.random.default_rng(3).standard_normal((64, kernel.STRIP * 3 + 5), dtype=np.float32)
    expected = kernel.quantize(w, 4, threads=1)
    assert_same(kernel.quantize(w, 4, threads=3), expected, "3 threads")
    assert_same(expected, reference.quantize(w, 4), "1 thread")


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize(("shape", "group_size"), [((64, 50), 64), ((6, 350), 14), ((64, 2048), 64), ((10, 70), 10)])
def test_slabs_change_nothing(
    rows: int, shape: tuple[int, ...], group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are kept for a few rows at a time, whose first element may belong to any of the 32 running sums."""
    w = np.random.default_rng(5).standard_normal(shape, dtype=np.float32)
    monkeypatch.setattr(kernel, "SLAB", rows * w.size // group_size)
    assert_same(kernel.quantize(w, 4, group_size), reference.quantize(w, 4, group_size), str(rows))


def test_memory_is_a_slab_and_a_few_numbers_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(6).standard_normal((64, 40_000), dtype=np.float32)
    kernel.quantize(w[:, :64].copy(), 4)
    monkeypatch.setattr(kernel, "SLAB", 40_000)
    tracemalloc.start()
    try:
        kernel.quantize(w, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    codes, slab, groups = w.size // 2, 4 * 40_000, 4 * 40_000
    assert peak < codes + slab + 3 * groups + 100_000


def each(function: Callable[[Any], Any], x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What only kernels can call, of every number."""
    compiled = numba.njit(error_model="numpy")(function)
    return np.array([compiled(v) for v in x], np.float32)


def test_libm_equals_reference() -> None:
    rng = np.random.default_rng(4)
    bits = rng.integers(0x00800000, 0x7F800000, 20_000).astype(np.int32)
    x = np.concatenate([bits.view(np.float32), np.float32(rng.uniform(0.1, 4, 20_000))])
    assert each(lambda v: logf(v), x).tobytes() == libm.logf(x).tobytes()
    x = np.float32(rng.uniform(-87, 88, 20_000))
    assert each(lambda v: expf(v), x).tobytes() == libm.expf(x).tobytes()


def test_refuses_unequal_planes_as_the_reference_does() -> None:
    w = np.zeros((6, 10), np.float32)
    for quantize in (kernel.quantize, reference.quantize):
        with pytest.raises(ValueError, match="expected a multiple of 4 rows for 2-bit planes, got 6"):
            quantize(w, 2, 6)
