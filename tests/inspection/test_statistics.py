"""uqff.inspection.statistics: numbers small enough to check by hand, and the borders between chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uqff.inspection import Statistics, statistics, statistics_of


def test_by_hand() -> None:
    """Every number; the greatest value belongs to the last bin."""
    found = statistics_of(np.array([[-8, -7, 0, 8], [0, -0.0, 7, 0]], np.float32))
    assert found == Statistics(
        count=8,
        nan=0,
        inf=0,
        zeros=4,
        min=-8.0,
        max=8.0,
        mean=0.0,
        std=math.sqrt((64 + 49 + 64 + 49) / 8),
        abs_mean=30 / 8,
        histogram=(1, 1, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 2),
    )
    assert found.edges == [float(edge) for edge in range(-8, 9)]
    assert found.zeros_percent == 50.0


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    """One infinity must not make every other number infinite."""
    found = statistics_of(np.array([np.nan, np.inf, -np.inf, 1, 3], np.float32))
    assert (found.count, found.nan, found.inf, found.zeros) == (5, 1, 2, 0)
    assert (found.min, found.max, found.mean, found.std, found.abs_mean) == (1.0, 3.0, 2.0, 1.0, 2.0)
    assert sum(found.histogram) == 2


@pytest.mark.parametrize("values", [[], [np.nan, np.inf]])
def test_nothing_finite(values: list[float]) -> None:
    """No numbers rather than warnings."""
    found = statistics_of(np.array(values, np.float32))
    assert (found.min, found.max, found.mean, found.std, found.abs_mean) == (None,) * 5
    assert (found.histogram, found.edges, found.zeros_percent) == ((0,) * 16, [], 0.0)


@pytest.mark.parametrize("value", [0.0, 1e20, -3.4e38])
def test_all_equal(value: float) -> None:
    """A range of nothing has all in the first bin."""
    found = statistics_of(np.full(5, value, np.float32))
    assert found.histogram == (5, *(0,) * 15)
    assert found.std == 0.0


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers are exact in any order, so the chunk size must not matter."""
    values = np.random.default_rng(0).integers(-100, 100, 1000).astype(np.float32)
    values[[3, 500]] = np.nan, np.inf
    whole = statistics_of(values)
    monkeypatch.setattr(statistics, "_CHUNK", 7)
    chunked = statistics_of(values)
    assert (chunked.histogram, chunked.mean, chunked.min, chunked.max) == (
        whole.histogram,
        whole.mean,
        whole.min,
        whole.max,
    )
    finite = values[np.isfinite(values)]
    assert whole.histogram == tuple(np.histogram(finite, 16)[0])
