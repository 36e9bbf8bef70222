"""uqff.simd.row beside numpy: what is done between products. Torch's bits: tests/parallel/test_decoder_chain.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

row: Any = pytest.importorskip("uqff.simd.row", reason="no numba")


def test_sums_and_biases() -> None:
    total, x, bias = (np.array(each, np.float32) for each in ([1, 2, 3], [1e8, 0.5, -3], [1, 0.25, 0]))
    expected = total + (x + bias)
    made = total.copy()
    row.add((made, x, bias), 3)
    assert (made == expected).all()
    made = total.copy()
    row.add((made, x, np.empty(0, np.float32)), 3)
    assert (made == total + x).all()
    made = x.copy()
    row.biased((made, bias), 3)
    assert (made == x + bias).all()


def test_heads_are_turned_by_the_angles_of_their_position() -> None:
    generator = np.random.default_rng(1)
    x, angle = generator.standard_normal((3, 8), np.float32), generator.standard_normal((5, 4)).astype(np.float32)
    cos, sin = np.tile(np.cos(angle), 2), np.concatenate([-np.sin(angle), np.sin(angle)], 1)
    expected = x * cos[2] + np.roll(x, 4, 1) * sin[2]
    alone, cache, kept = (np.zeros((3, n, 8), np.float32) for n in (1, 5, 5))
    position = np.array([2])
    row.rotate((x, cos, sin, position, alone, False), 3)
    row.rotate((x, cos, sin, position, cache, True), 3)
    row.keep((x, position, kept), 3)
    assert (alone[:, 0] == expected).all()
    for made, there in ((cache, expected), (kept, x)):
        assert (made[:, 2] == there).all()
        assert not made[:, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("lanes", row.VECTORS)
@pytest.mark.parametrize("n", [1, 16, 63, 64, 130, 1000, 4096, 40_000])
def test_norms(n: int, lanes: int) -> None:
    """Whatever the order of the sum, of small whole numbers it is exact."""
    generator = np.random.default_rng(n)
    x = generator.integers(-3, 4, (2, n)).astype(np.float32)
    x[:, 0] = 3
    weight, eps = generator.standard_normal(n, np.float32), np.float32(0.5)
    made = np.empty_like(x)
    row.norm((x, weight, eps, lanes, made), 2)
    mean = (x * x).sum(1, dtype=np.float32) / np.float32(n)
    factor = np.float32(1) / np.sqrt(mean + eps)
    assert (made == weight * (x * factor[:, None])).all()


def test_gates() -> None:
    """Within two units in the last place; and at the edges."""
    x = np.concatenate([np.linspace(-95, 95, 1016), [np.nan, np.inf, -np.inf, 0, -0.0, 1e30, -1e30, 104]])
    gates, ups, made = x.astype(np.float32), np.full(len(x), 2, np.float32), np.empty(len(x), np.float32)
    row.gate((gates, ups, made), len(x) // row.GATED)
    wide = gates[:1016].astype(np.float64)
    expected = (2 * wide / (1 + np.exp(-wide))).astype(np.float32)
    units = np.abs(made[:1016].view(np.int32) - expected.view(np.int32))
    assert units[np.abs(wide) < 80].max() <= 3
    edges = [np.nan, np.inf, np.nan, 0, 0, np.float32(1e30) * 2, 0, 208]  # -inf: what torch makes of it, too
    assert np.array_equal(made[1016:], np.array(edges, np.float32), equal_nan=True)
