"""Rows of a tile times rows of activations: four of these at once give the bits of two, on any CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

decoding: Any = pytest.importorskip("uqff.simd.decoding", reason="no numba")
compiling: Any = pytest.importorskip("uqff.simd.compiling", reason="no numba")

_by_2, _by_4 = decoding._multiply_tile, decoding._multiply_tile_by_4


def two(tile: Any, rows: Any, i: Any, known: Any, x: Any, row: Any, start: Any, width: Any, y: Any) -> None:
    """A kernel: rows of activations in pairs, until there are none."""
    for each in range(row, min(len(x), row + 4), 2):
        _by_2(tile, rows, i, known, x, each, start, width, y)


def four(tile: Any, rows: Any, i: Any, known: Any, x: Any, row: Any, start: Any, width: Any, y: Any) -> None:
    """A kernel: four at once."""
    _by_4(tile, rows, i, known, x, row, start, width, y)


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("known", [1, 2, 3])
def test_four_rows_at_once(batch: int, known: int) -> None:
    """Of a tile's rows one to three; the first part of the sums, and a later one; nothing else is written."""
    rng = np.random.default_rng(batch * 10 + known)
    tile = rng.standard_normal(decoding.TILE).astype(np.float32)
    rows, width = np.array([4, 1, 7, 0, 3, 2], np.int64), 96
    x = rng.standard_normal((batch + 1, 2 * width)).astype(np.float32)
    made = []
    for function in (compiling.kernel(two), compiling.kernel(four)):
        y = np.full((batch + 1, 8), np.float32(9))
        for start in (0, width):
            function(tile, rows, 3, known, x, 1, start, width, y)
        made.append(y)
    assert made[0].tobytes() == made[1].tobytes()
    assert (made[0] != 9).sum() == batch * known
