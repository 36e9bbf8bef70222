"""Statistics and a histogram of a dequantised weight, in one pass over chunks each, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "Statistics", "statistics_of"]

BINS = 16
"""Bins of the histogram."""

_CHUNK = 1 << 20
"""Elements taken at a time, so that the float64 temporaries stay small."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Statistics:
    """Of the finite elements, except where stated.

    Attributes:
        count: all elements.
        nan: elements that are not a number.
        inf: elements that are infinite.
        zeros: elements that are 0 or -0.
        min: least; None, like the numbers that follow, if no element is finite.
        max: greatest.
        mean: arithmetic mean.
        std: standard deviation of the population.
        abs_mean: mean of the absolute values.
        histogram: how many elements fall into each of :data:`BINS` equal bins from ``min`` to ``max``; a bin contains
            its lower edge, the last one its upper edge too.  If all elements are equal, they are in the first bin.
    """

    count: int
    nan: int
    inf: int
    zeros: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    abs_mean: float | None
    histogram: tuple[int, ...]

    @property
    def zeros_percent(self) -> float:
        """Share of zeros among all elements."""
        return 100 * self.zeros / self.count if self.count else 0.0

    @property
    def edges(self) -> list[float]:
        """The bin edges, one more than bins; empty if no element is finite."""
        if self.min is None or self.max is None:
            return []
        width = (self.max - self.min) / BINS
        return [*(self.min + i * width for i in range(BINS)), self.max]


def statistics_of(values: Floats) -> Statistics:
    """Count, measure and sort into bins.

    Args:
        values: numbers of any shape; float32 for a dequantised weight.
    """
    flat = values.reshape(-1)
    nan = inf = zeros = finite = 0
    low, high, total, absolute = math.inf, -math.inf, 0.0, 0.0
    for at in range(0, flat.size, _CHUNK):
        chunk = flat[at : at + _CHUNK]
        nan += int(np.count_nonzero(np.isnan(chunk)))
        inf += int(np.count_nonzero(np.isinf(chunk)))
        zeros += int(np.count_nonzero(chunk == 0))
    for part in _finite_chunks(flat):
        finite += part.size
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        total += float(part.sum())
        absolute += float(np.abs(part).sum())
    if not finite:
        return Statistics(flat.size, nan, inf, zeros, None, None, None, None, None, (0,) * BINS)
    mean, squares = total / finite, 0.0
    counts = np.zeros(BINS, np.int64)
    for part in _finite_chunks(flat):
        squares += float(np.square(part - mean).sum())
        if high > low:
            bins = np.minimum(((part - low) / (high - low) * BINS).astype(np.int64), BINS - 1)
        else:
            bins = np.zeros(part.size, np.int64)
        counts += np.bincount(bins, minlength=BINS)
    return Statistics(
        flat.size,
        nan,
        inf,
        zeros,
        low,
        high,
        mean,
        math.sqrt(squares / finite),
        absolute / finite,
        tuple(int(n) for n in counts),
    )


def _finite_chunks(flat: Floats) -> Iterator[npt.NDArray[np.float64]]:
    for at in range(0, flat.size, _CHUNK):
        chunk = flat[at : at + _CHUNK].astype(np.float64)
        finite = chunk[np.isfinite(chunk)]
        if finite.size:
            yield finite
