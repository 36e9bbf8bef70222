"""``effort="best"``: what the families' searches share.  They find codes and scales; here the result is compared.

A block counts only if, as a reader sees it, its weighted squared error is below that of the engine's block: so no block
is worse than the engine's, whatever a search does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.families.loaded import Loaded
from uqff.numerics.fitting import total
from uqff.simd.threads import run_ranges

__all__ = ["Parts", "better_blocks", "choose", "importance_of", "importance_of_run", "squared_errors"]

F32: TypeAlias = npt.NDArray[np.float32]
Parts: TypeAlias = tuple[npt.NDArray[Any], ...]
"""Arrays with a row for every block."""

GRAIN: Final = 1 << 15
"""Weights of a range at least."""


def better_blocks(
    loaded: Loaded,
    size: int,
    importance: F32 | None,
    engine: Callable[[F32], Parts],
    search: Callable[[F32, F32], Parts],
    numbers: Callable[[Parts], F32],
) -> Parts:
    """The parts of a weight whose blocks are independent, each the engine's or, if that is nearer, the search's.

    Args:
        loaded: the weight; if it is not whole blocks, zeros are taken for what the last one lacks.
        size: weights of a block.
        importance: see :class:`uqff.families.encoding.Effort`.
        engine: makes parts of blocks, float32 ``[n, size]``.
        search: makes them of blocks and the weights of the squared errors.
        numbers: dequantises them, to float32 ``[n, size]``.
    """
    made: list[Parts] = []
    at = 0
    for run in loaded.runs():
        lacking = -len(run) % size
        x = np.pad(run, (0, lacking)).reshape(-1, size) if lacking else run.reshape(-1, size)
        w = importance_of_run(importance, loaded.shape, at, len(run)) if importance is not None else None
        w = np.ones_like(x) if w is None else np.pad(w, (0, lacking)).reshape(-1, size)
        made.append(_better(x, w, engine(x), search, numbers))
        at += len(run)
    return made[0] if len(made) == 1 else tuple(np.concatenate(each) for each in zip(*made, strict=True))


def _better(
    x: F32, w: F32, engine: Parts, search: Callable[[F32, F32], Parts], numbers: Callable[[Parts], F32]
) -> Parts:
    parts = tuple(np.array(each) for each in engine)

    def work(lo: int, hi: int) -> None:
        these = tuple(each[lo:hi] for each in parts)
        own = search(x[lo:hi], w[lo:hi])
        better = choose(x[lo:hi], w[lo:hi], numbers(these), numbers(own))
        for part, new in zip(these, own, strict=True):
            part[better] = new[better]

    run_ranges(work, len(x), grain=max(1, GRAIN // x.shape[1]))
    return parts


def choose(x: F32, w: F32, engine: F32, own: F32) -> npt.NDArray[np.bool_]:
    """Which blocks are nearer in ``own`` than in ``engine``; all ``[n, size]``. Not those that are no numbers."""
    with np.errstate(all="ignore"):
        before, after = squared_errors(x, w, engine, own)
        nearer: npt.NDArray[np.bool_] = (after < before) | (np.isnan(before) & np.isfinite(after))
        return nearer


def squared_errors(x: F32, w: F32, y: F32, z: F32) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The weighted squared errors of every block of y and of z, ``[n]``: float64, in the order of the elements."""
    if simd.enabled():
        from uqff.simd import fitting

        kernel: Any = fitting.squared_errors
        made = np.empty((2, len(x)))
        kernel(x, w, y, z, *made, 0, len(x))
        return made[0], made[1]
    of_y, of_z = (x.T.astype(np.float64) - each.T for each in (y, z))
    return total(w.T * of_y * of_y), total(w.T * of_z * of_z)


def importance_of_run(importance: F32, shape: Sequence[int], start: int, count: int) -> F32:
    """:func:`importance_of` of elements side by side."""
    if len(importance) > 1:
        return importance_of(importance, shape, np.arange(start, start + count))
    return np.resize(np.roll(importance[0], -(start % shape[-1])), count)


def importance_of(importance: F32, shape: Sequence[int], flat: npt.NDArray[np.int64]) -> F32:
    """The importance of elements, given by their places in the flattened weight."""
    columns = shape[-1]
    expert = flat // math.prod(shape[1:]) if len(importance) > 1 else np.zeros_like(flat)
    made: F32 = importance[expert, flat % columns]
    return made
