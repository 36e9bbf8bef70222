"""HQQ quantiser, the fast twin of :mod:`uqff.families.hqq`, bit-equal to it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from uqff.families import hqq as reference
from uqff.kernels.bits import BELOW_HALF, MAGNITUDE, bits_of, float_of
from uqff.kernels.libm import expf, logf
from uqff.kernels.threads import run_ranges
from uqff.packing import packed_rows

__all__ = ["quantize"]

F32: TypeAlias = npt.NDArray[np.float32]

EXPONENT = reference.EXPONENT
LANES = reference.LANES

STRIP = 1024
"""Columns that a thread takes through all rows at a time: what it keeps per column stays in the first-level cache."""

LARGEST = np.float32(1e30)
"""Beyond it the arithmetic may overflow, and the reference takes over; no real weight comes near."""


def quantize(
    w: F32, bits: int, group_size: int = 64, steps: int = 10, threads: int | None = None
) -> tuple[npt.NDArray[Any], F32, F32]:
    """See :func:`uqff.families.hqq.quantize`; ``w`` must be C-contiguous.

    Needs memory for the errors of all elements, in float32: the test for improvement adds them in an order that crosses
    all groups.
    """
    grid = w.reshape(group_size, -1)
    columns = grid.shape[1]
    top = np.float32(2**bits - 1)
    low, high = np.empty((2, columns), np.float32)
    run_ranges(lambda lo, hi: extremes(grid, low, high, lo, hi), columns, grain=STRIP, threads=threads)
    if not max(high.max(), -low.min()) < LARGEST:
        return reference.quantize(w, bits, group_size, steps)
    with np.errstate(all="ignore"):
        s = np.clip(np.float32(1) / (high - low) * top, np.float32(0), reference.LARGEST_SCALE)
        zero = -low * s
    zero = _optimize(grid, s, zero, top, steps, threads)
    packed = np.empty((packed_rows(group_size, bits), columns), np.int32 if bits == 3 else np.uint8)
    run_ranges(
        lambda lo, hi: pack_codes(grid, s, zero, top, bits, packed, lo, hi), columns, grain=STRIP, threads=threads
    )
    return packed, (np.float32(1) / s)[None], zero[None]


def _optimize(grid: F32, s: F32, zero: F32, top: np.float32, steps: int, threads: int | None) -> F32:
    magnitudes = np.empty_like(grid)
    beta, best = reference.BETA, reference.FIRST_ERROR
    for _ in range(steps):
        inverse_beta, idle = np.float32(1 / beta), reference.idle(beta)
        run_ranges(
            lambda lo, hi, a=inverse_beta, b=idle: turn(grid, s, zero, top, a, b, magnitudes, lo, hi),  # type: ignore[misc]
            len(s),
            grain=STRIP,
            threads=threads,
        )
        beta *= reference.KAPPA
        current = _mean(magnitudes.reshape(-1), threads)
        if not current < best:
            break
        best = current
    return zero


def _mean(magnitudes: F32, threads: int | None) -> np.float32:
    """:func:`uqff.families.hqq.mean_magnitude` of magnitudes; two threads take half the running sums each."""
    lanes = np.zeros(LANES, np.float32)
    half = LANES // 2
    run_ranges(lambda lo, hi: lane_sums(magnitudes, lanes, half * lo, half * hi), 2, threads=threads)
    full = len(magnitudes) // LANES * reference.LANES
    return reference.mean_of_lanes(lanes, magnitudes[full:], len(magnitudes))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def extremes(grid, low, high, lo, hi):  # type: ignore[no-untyped-def]
    """Minimum and maximum of columns [lo, hi)."""
    low, high = low[lo:hi], high[lo:hi]
    low[:], high[:] = grid[0, lo:hi], grid[0, lo:hi]
    for i in range(1, grid.shape[0]):
        row = grid[i, lo:hi]
        for j in range(row.size):
            low[j] = row[j] if row[j] < low[j] else low[j]
            high[j] = row[j] if row[j] > high[j] else high[j]


@njit(inline="always", error_model="numpy")
def code(x, top):  # type: ignore[no-untyped-def]
    """``round`` then ``clip`` to 0..top, as int32; clipped first, so that the conversion cannot overflow."""
    x = top if x > top else x
    x = np.float32(0) if x < np.float32(0) else x
    return np.int32(x + BELOW_HALF)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def turn(grid, s, zero, top, inverse_beta, idle, magnitudes, lo, hi):  # type: ignore[no-untyped-def]
    """One turn of the optimiser on columns [lo, hi): moves ``zero``, leaves the magnitude of each error."""
    q = np.empty(STRIP, np.float32)
    e = np.empty(STRIP, np.float32)
    sums = np.empty(STRIP, np.float32)
    mean = np.float32(1.0 / grid.shape[0])
    for start in range(lo, hi, STRIP):
        end = min(start + STRIP, hi)
        n = end - start
        scale, z = s[start:end], zero[start:end]
        sums[:n] = np.float32(0)
        for i in range(grid.shape[0]):
            row, out = grid[i, start:end], magnitudes[i, start:end]
            peak = np.uint32(0)
            for j in range(n):
                q[j] = np.float32(code(row[j] * scale[j] + z[j], top))
                e[j] = row[j] - (q[j] - z[j]) / scale[j]
                magnitude = bits_of(e[j]) & MAGNITUDE
                out[j] = float_of(magnitude)
                peak = max(peak, magnitude)
            if float_of(peak) > idle:
                for j in range(n):
                    sums[j] += q[j] - (row[j] - shrink(e[j], inverse_beta, idle)) * scale[j]
            else:
                for j in range(n):
                    sums[j] += q[j] - row[j] * scale[j]
        for j in range(n):
            z[j] = sums[j] * mean


@njit(error_model="numpy")
def shrink(error, inverse_beta, idle):  # type: ignore[no-untyped-def]
    """See :func:`uqff.families.hqq.shrink`."""
    magnitude = abs(error)
    if magnitude <= idle:
        return np.float32(0)
    kept = max(magnitude - inverse_beta * expf(EXPONENT * logf(magnitude)), np.float32(0))
    return kept if error > np.float32(0) else -kept


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def lane_sums(magnitudes, lanes, lo, hi):  # type: ignore[no-untyped-def]
    """Running sums [lo, hi) of 32: ``lanes[k]`` gets the elements whose index is k modulo 32, in order."""
    sums = lanes[lo:hi]
    for start in range(0, magnitudes.size // LANES * LANES, LANES):
        run = magnitudes[start + lo : start + hi]
        for k in range(run.size):
            sums[k] += run[k]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def pack_codes(grid, s, zero, top, bits, packed, lo, hi):  # type: ignore[no-untyped-def]
    """Columns [lo, hi) of the packed codes, made with the final zeros; see :func:`uqff.packing.pack_planes`."""
    rows = packed.shape[0]
    scale, z = s[lo:hi], zero[lo:hi]
    for r in range(rows):
        out = packed[r, lo:hi]
        out[:] = 0
        planes = 1 if bits == 8 else (10 if bits == 3 else 8 // bits)
        for p in range(planes):
            i = p * rows + r
            if i < grid.shape[0]:
                row = grid[i, lo:hi]
                shift = np.int32(bits * (planes - 1 - p))
                for j in range(row.size):
                    out[j] |= code(row[j] * scale[j] + z[j], top) << shift
