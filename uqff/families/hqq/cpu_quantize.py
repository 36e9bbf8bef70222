"""HQQ quantiser, the fast twin of :mod:`uqff.families.hqq.reference`, bit-equal to it."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.hqq import reference
from uqff.numerics.packing import packed_rows
from uqff.simd.arithmetic import unsigned_code
from uqff.simd.bits import MAGNITUDE, bits_of, float_of
from uqff.simd.compiling import kernel, subroutine
from uqff.simd.libm import expf, logf
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges

__all__ = ["quantize"]

F32: TypeAlias = npt.NDArray[np.float32]

EXPONENT = reference.EXPONENT
LANES = reference.LANES

STRIP = 1024
"""Columns that a thread takes through all rows at a time: what it keeps per column stays in the first-level cache."""

SLAB = 1 << 22
"""Errors that are kept at a time: at least a row's, one for every group."""

LARGEST = np.float32(1e30)
"""Beyond it the arithmetic may overflow, and the reference takes over; no real weight comes near."""


def quantize(
    w: F32, bits: int, group_size: int = 64, steps: int = 10, threads: int | None = None
) -> tuple[npt.NDArray[Any], F32, F32]:
    """See :func:`uqff.families.hqq.reference.quantize`; ``w`` must be C-contiguous.

    Needs memory for :data:`SLAB` errors besides a number per group: the test for improvement adds them in an order that
    crosses all groups.
    """
    grid = w.reshape(group_size, -1)
    columns = grid.shape[1]
    top = np.float32(2**bits - 1)
    s, zero = np.empty((2, columns), np.float32)
    run_ranges(lambda lo, hi: extremes(grid, zero, s, lo, hi), columns, grain=STRIP, threads=threads)
    if not max(s.max(), -zero.min()) < LARGEST:
        return reference.quantize(w, bits, group_size, steps)
    with np.errstate(all="ignore"):
        # In place: s holds the maximum, zero the minimum.
        np.divide(np.float32(1), np.subtract(s, zero, out=s), out=s)
        np.clip(np.multiply(s, top, out=s), np.float32(0), reference.LARGEST_SCALE, out=s)
        np.multiply(np.negative(zero, out=zero), s, out=zero)
    _optimize(grid, s, zero, top, steps, threads)
    packed = np.empty((packed_rows(group_size, bits), columns), np.int32 if bits == 3 else np.uint8)
    run_ranges(
        lambda lo, hi: pack_codes(grid, s, zero, top, bits, packed, lo, hi), columns, grain=STRIP, threads=threads
    )
    return packed, np.divide(np.float32(1), s, out=s)[None], zero[None]


def _optimize(grid: F32, s: F32, zero: F32, top: np.float32, steps: int, threads: int | None) -> None:
    """Moves ``zero``. A turn goes through all columns a slab of rows at a time."""
    rows, columns = grid.shape
    slab = min(rows, max(1, SLAB // columns))
    errors, sums = np.empty(slab * columns, np.float32), np.empty(columns, np.float32)
    beta, best = reference.BETA, reference.FIRST_ERROR
    for _ in range(steps):
        inverse_beta, idle = np.float32(1 / beta), reference.idle(beta)
        lanes = np.zeros(LANES, np.float32)
        for first in range(0, rows, slab):
            last = min(first + slab, rows)
            work = partial(turn, grid, s, zero, top, inverse_beta, idle, sums, errors, first, last)
            run_ranges(work, columns, grain=STRIP, threads=threads)
            made = errors[: (last - first) * columns]
            rest = made[len(made) - (grid.size % LANES if last == rows else 0) :]
            _add_lanes(made[: len(made) - len(rest)], lanes, first * columns % LANES, threads)
        beta *= reference.KAPPA
        current = reference.mean_of_lanes(lanes, rest, grid.size)
        if not current < best:
            break
        best = current


def _add_lanes(errors: F32, lanes: F32, phase: int, threads: int | None) -> None:
    """The running sums of :func:`uqff.families.hqq.reference.mean_magnitude`; two threads take half of them each."""
    half = LANES // 2
    run_ranges(lambda lo, hi: lane_sums(errors, lanes, phase, half * lo, half * hi), 2, threads=threads)


@kernel
def extremes(grid, low, high, lo, hi):
    """Minimum and maximum of columns [lo, hi)."""
    low, high = low[lo:hi], high[lo:hi]
    # Element by element: numba compiles, for an array assigned to a slice, the text of the error that it may not fit.
    for j in range(hi - lo):
        low[j] = high[j] = grid[0, lo + j]
    for i in range(1, grid.shape[0]):
        row = grid[i, lo:hi]
        for j in range(row.size):
            low[j] = row[j] if row[j] < low[j] else low[j]
            high[j] = row[j] if row[j] > high[j] else high[j]


@kernel
def turn(grid, s, zero, top, inverse_beta, idle, sums, errors, first, last, lo, hi):
    """One turn of the optimiser on columns [lo, hi) of rows [first, last).

    Leaves the magnitude of each error, row after row; adds to ``sums``; the last rows move ``zero``.
    """
    q = scratch(STRIP, np.float32)
    e = scratch(STRIP, np.float32)
    total = scratch(STRIP, np.float32)
    rows, columns = grid.shape
    mean = np.float32(1.0 / rows)
    for start in range(lo, hi, STRIP):
        end = min(start + STRIP, hi)
        n = end - start
        scale, z = s[start:end], zero[start:end]
        for j in range(n):
            total[j] = np.float32(0) if first == 0 else sums[start + j]
        for i in range(first, last):
            at = (i - first) * columns
            row, out = grid[i, start:end], errors[at + start : at + end]
            peak = np.uint32(0)
            for j in range(n):
                q[j] = unsigned_code(row[j] * scale[j] + z[j], top)
                e[j] = row[j] - (q[j] - z[j]) / scale[j]
                magnitude = bits_of(e[j]) & MAGNITUDE
                out[j] = float_of(magnitude)
                peak = max(peak, magnitude)
            if float_of(peak) > idle:
                for j in range(n):
                    total[j] += q[j] - (row[j] - shrink(e[j], inverse_beta, idle)) * scale[j]
            else:
                for j in range(n):
                    total[j] += q[j] - row[j] * scale[j]
        if last == rows:
            for j in range(n):
                z[j] = total[j] * mean
        else:
            for j in range(n):
                sums[start + j] = total[j]


@subroutine
def shrink(error, inverse_beta, idle):
    """See :func:`uqff.families.hqq.reference.shrink`."""
    magnitude = abs(error)
    if magnitude <= idle:
        return np.float32(0)
    kept = max(magnitude - inverse_beta * expf(EXPONENT * logf(magnitude)), np.float32(0))
    return kept if error > np.float32(0) else -kept


@kernel
def lane_sums(errors, lanes, phase, lo, hi):
    """Running sums [lo, hi) of 32: ``lanes[k]`` gets the elements whose index + ``phase`` is k modulo 32, in order."""
    sums = lanes[lo:hi]
    whole = (LANES - phase) % LANES
    for i in range(min(whole, errors.size)):
        k = phase + i
        if lo <= k < hi:
            lanes[k] += errors[i]
    end = whole + max(errors.size - whole, 0) // LANES * LANES
    for start in range(whole, end, LANES):
        run = errors[start + lo : start + hi]
        for k in range(run.size):
            sums[k] += run[k]
    for i in range(end, errors.size):
        k = i - end
        if lo <= k < hi:
            lanes[k] += errors[i]


@kernel
def pack_codes(grid, s, zero, top, bits, packed, lo, hi):
    """Columns [lo, hi) of the packed codes, with the final zeros; see :func:`uqff.numerics.packing.pack_planes`."""
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
                    out[j] |= np.int32(unsigned_code(row[j] * scale[j] + z[j], top)) << shift
