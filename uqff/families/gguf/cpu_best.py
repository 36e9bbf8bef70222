"""The fast twin of :mod:`uqff.families.gguf.reference_best`, equal to it bit for bit."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import reference_best
from uqff.families.gguf.reference_best import AFFINE, SCALED, put_affine, put_scaled
from uqff.numerics.fitting import F16
from uqff.simd import fitting
from uqff.simd.threads import run_ranges

__all__ = ["quantize"]

Blocks: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

GRAIN = 256
"""Blocks of a range at least."""


def quantize(name: str, x: Blocks, w: Blocks) -> U8:
    """See :func:`uqff.families.gguf.reference_best.quantize`; both arrays must be C-contiguous."""
    with np.errstate(all="ignore"):
        return _quantize(name, x, w)


def _quantize(name: str, x: Blocks, w: Blocks) -> U8:
    count, size = x.shape
    if name in SCALED and size <= fitting.MOST:
        scaled = SCALED[name]
        d, codes = np.empty(count, np.float32), np.empty((count, size), np.int8)
        bounds = float(scaled.low), float(scaled.high)
        run_ranges(
            lambda lo, hi: fitting.scaled_blocks(x, w, *bounds, scaled.starts, scaled.form, d, codes, lo, hi),
            count,
            grain=GRAIN,
        )
        return put_scaled(name, d, codes.T.astype(np.int32) + scaled.bias)
    if name in AFFINE:
        affine = AFFINE[name]
        d, m = np.empty((2, count), np.float32)
        codes = np.empty((count, size), np.uint8)
        run_ranges(
            lambda lo, hi: fitting.affine_blocks(x, w, float(affine.top), affine.starts, F16, d, m, codes, lo, hi),
            count,
            grain=GRAIN,
        )
        return put_affine(name, d, m, codes.T.astype(np.int32))
    return reference_best.quantize(name, x, w)
