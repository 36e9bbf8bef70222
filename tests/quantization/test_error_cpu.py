"""Distances are defined to the last bit: the kernel's sums are the reference's, and those are a plain loop's."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

import uqff
from tests.support.quantize_inputs import weights
from uqff.quantization.error import Measure, distance, pair_sums, reference_sums

F32 = npt.NDArray[np.float32]


def by_hand(a: F32, b: F32) -> list[float]:
    """The definition, one element at a time."""
    lanes = [[0.0] * 16 for _ in range(4)]
    largest = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        d = float(np.float32(y - x))
        for at, product in enumerate((float(x) * float(x), float(y) * float(y), float(x) * float(y), d * d)):
            lanes[at][i % 16] += product
        largest = max(largest, abs(d))
    totals = []
    for each in lanes:
        total = each[0]
        for lane in each[1:]:
            total += lane
        totals.append(total)
    return [*totals, largest]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 1000])
def test_reference_is_the_loop(size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((2, size), np.float32) * np.float32(1e3)
    assert reference_sums(a, b).tolist() == by_hand(a, b)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 1000, 100_003])
def test_kernel_is_the_reference(size: int) -> None:
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((2, size), np.float32)
    a.flags.writeable = False
    assert pair_sums(a, b).tobytes() == reference_sums(a, b).tobytes()


def test_kernel_is_the_reference_on_odd_numbers() -> None:
    """Subnormals, overflow of the difference, signed zeros, every scale."""
    for name, a in weights().items():
        for b in (np.flip(a), np.float32(0.97) * a, np.zeros_like(a)):
            x, y = a.ravel(), np.ascontiguousarray(b).ravel()
            assert pair_sums(x, y).tobytes() == reference_sums(x, y).tobytes(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 20, 35])
def test_what_is_not_finite_is_seen(bad: float, at: int) -> None:
    """In the lanes and in the rest, a NaN in any sum and in the largest difference."""
    a = np.ones(36, np.float32)
    b = a.copy()
    b[at] = bad
    for x, y in ((a, b), (b, a), (b, b)):
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(pair_sums(x, y), reference_sums(x, y))
        measure = Measure()
        measure.add(x, y)
        measure.add(a, a)
        assert math.isnan(measure.largest) == (x is y or math.isnan(bad))


@pytest.mark.parametrize("kind", ["q4k", "hqq4", "f8q8", "afq4", "fp8"])
def test_neither_threads_nor_kernels_change_a_distance(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(130, 2560, generator=torch.Generator().manual_seed(1))
    record = uqff.quantize(weight, kind)
    found = []
    for threads, kernels in (("1", "numba"), ("3", "numba"), ("2", "reference")):
        monkeypatch.setenv("UQFF_NUM_THREADS", threads)
        monkeypatch.setenv("UQFF_KERNELS", kernels)
        found.append(distance(weight.numpy(), record))
    assert found[0] == found[1] == found[2]
