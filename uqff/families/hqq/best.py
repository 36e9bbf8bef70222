"""``effort="best"`` of HQQ: its groups are columns of the whole weight, a range of which is searched at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.best import choose, importance_of
from uqff.numerics.packing import pack_planes, unpack_planes
from uqff.simd.threads import run_ranges

__all__ = ["better_columns"]

F32: TypeAlias = npt.NDArray[np.float32]
Made: TypeAlias = tuple[npt.NDArray[Any], F32, F32]

GRAIN: Final = 512
"""Groups of a range at least."""


def better_columns(
    weight: F32,
    importance: F32 | None,
    group_size: int,
    bits: int,
    engine: Made,
    search: Callable[[F32, F32, int], Made],
) -> Made:
    """Packed codes, scales and zeros: of each group the engine's or, if that is nearer, the search's.

    Args:
        weight: finite float32, element ``i * groups + j`` in group j.
        importance: see :class:`uqff.families.encoding.Effort`.
        group_size: elements of a group.
        bits: of a code.
        engine: what :func:`uqff.families.hqq.reference.quantize` made.
        search: :func:`uqff.families.hqq.reference.search`, or its kernel.
    """
    grid = weight.reshape(group_size, -1)
    packed, scales, zeros = (np.array(each) for each in engine)

    def work(lo: int, hi: int) -> None:
        x = np.ascontiguousarray(grid[:, lo:hi].T)
        w = _weights(importance, weight.shape, *grid.shape, lo, hi)
        before = unpack_planes(packed[:, lo:hi], bits)[: len(grid)].T, scales[0, lo:hi], zeros[0, lo:hi]
        own = search(x, w, bits)
        better = choose(x, w, _numbers(*before), _numbers(*own))
        codes = np.where(better[:, None], own[0], before[0])
        packed[:, lo:hi] = pack_planes(np.ascontiguousarray(codes.T), bits)
        scales[0, lo:hi] = np.where(better, own[1], before[1])
        zeros[0, lo:hi] = np.where(better, own[2], before[2])

    run_ranges(work, grid.shape[1], grain=GRAIN)
    return packed, scales, zeros


def _numbers(codes: npt.NDArray[np.uint8], scales: F32, zeros: F32) -> F32:
    """What a reader sees: ``(q - zero) * scale``."""
    with np.errstate(all="ignore"):
        return (codes.astype(np.float32) - zeros[:, None]) * scales[:, None]


def _weights(importance: F32 | None, shape: tuple[int, ...], rows: int, columns: int, lo: int, hi: int) -> F32:
    """Weights of the squared errors of groups [lo, hi), ``[hi - lo, rows]``."""
    if importance is None:
        return np.ones((hi - lo, rows), np.float32)
    return importance_of(importance, shape, np.arange(lo, hi)[:, None] + columns * np.arange(rows))
