"""HQQ on the CPU: bit-equal twins of :mod:`uqff.families.hqq.reference`.

Dequantising, ``(q - zero) * scale``, two roundings.  One kernel an axis: its items are the columns (axis 0) or rows
(axis 1) of the packed matrix.  Both take 32 columns at a time; the last 32 of a row overlap the ones before.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.hqq import reference
from uqff.numerics.fitting import F32 as FORM
from uqff.numerics.packing import PLANES, packed_rows
from uqff.simd.arithmetic import unsigned_code
from uqff.simd.bits import MAGNITUDE, bits_of, float_of
from uqff.simd.compiling import inline, kernel, subroutine
from uqff.simd.fitting import MOST, affine_blocks
from uqff.simd.libm import expf, logf
from uqff.simd.load_store import load_f32, load_i32, load_u8, prefetch_read
from uqff.simd.output import (
    AHEAD,
    FORMS,
    Bytes,
    looked_up,
    over,
    put_pair,
    put_pair_here,
    reach,
    read_ahead,
    unfold,
    without_subnormals,
    write_ahead,
)
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import LANES, i32_to_f32

if TYPE_CHECKING:
    from uqff.families.hqq.tensor import HQQ

__all__ = ["dequantize", "quantize"]

WIDTH = 2 * LANES

STRIP = 2048
"""Elements of the packed matrix that are taken through all rows (axis 0: with their scales and zeros) or all planes
(axis 1) together: once read, they stay in the first-level cache."""

LEAST = np.float32(2.0**-63)
"""If zeros and scales are 0 or at least this, no weight is subnormal: a code less a zero is 0, or minus the zero, or at
least 2**-24, of which a zero near a code from 1 on is a multiple. Two numbers of at least this make 2**-126."""


def dequantize(weight: HQQ, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    parts, numel = weight.parts, weight.numel
    bits, axis, group_size = weight.bits, weight.axis, weight.group_size
    planes, groups = PLANES[bits], numel // group_size
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    words, scales, zeros = (parts[name].array() for name in ("w_q", "scales", "zeros"))
    scale_dtype, zero_dtype = parts["scales"].dtype, parts["zeros"].dtype
    if scale_dtype not in FORMS or zero_dtype not in FORMS:
        return False
    kinds = FORMS[scale_dtype], FORMS[zero_dtype]
    height = -(-rows // planes)
    fits = len(words) == height * columns * (4 if bits == 3 else 1)
    fits &= len(scales) == groups * scale_dtype.itemsize and len(zeros) == groups * zero_dtype.itemsize
    if columns < WIDTH or not fits:
        return False
    kernel, items = (_columns, columns) if axis == 0 else (_rows, height)
    over(
        items,
        numel // items,
        lambda lo, hi: kernel(words, scales, zeros, *kinds, bits, planes, rows, columns, out, form, lo, hi),
    )
    return True


@inline
def _load(words: Bytes, at: int, bits: int) -> Any:
    """16 packed elements: I32 for 3 bits, else U8."""
    return load_i32(words, 4 * at) if bits == 3 else load_u8(words, at)


@looked_up
def _weights(codes: Any, mask: int, zero: Any, scale: Any) -> Any:
    return (i32_to_f32(codes & mask) - zero) * scale


@inline
def _onward(here: int, steps: int, width: int, columns: int) -> Any:
    """Elements from one in a row of a strip to the one that is taken so many steps later, perhaps in the next row."""
    return steps if here + steps < width else steps + columns - width


@kernel
def _columns(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
    scale_kind: int,
    zero_kind: int,
    bits: int,
    planes: int,
    rows: int,
    columns: int,
    out: Bytes,
    form: int,
    lo: int,
    hi: int,
) -> None:
    height, mask, size = (rows + planes - 1) // planes, (1 << bits) - 1, 4 if bits == 3 else 1
    strip_zeros, strip_scales = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for start in range(lo, hi, STRIP):
        # A strip is never narrower than what is written together: the last one overlaps what is before it if need be.
        first = min(start, hi - WIDTH)
        width = min(STRIP, hi - first)
        certain = unfold(strip_zeros, zeros, zero_kind, first, width, LEAST)
        certain &= unfold(strip_scales, scales, scale_kind, first, width, LEAST)
        to = without_subnormals(form, certain)
        for row in range(height):
            for column in range(0, width, WIDTH):
                here = min(column, width - WIDTH)
                at = row * columns + first + here
                prefetch_read(words, size * (at + _onward(here, AHEAD // size, width, columns)))
                ahead = _onward(here, reach(to), width, columns)
                zero_a, scale_a = load_f32(strip_zeros, here), load_f32(strip_scales, here)
                zero_b, scale_b = load_f32(strip_zeros, here + LANES), load_f32(strip_scales, here + LANES)
                if bits == 8:
                    x = (i32_to_f32(load_u8(words, at)) - zero_a) * scale_a
                    y = (i32_to_f32(load_u8(words, at + LANES)) - zero_b) * scale_b
                    write_ahead(out, at, to, ahead)
                    put_pair_here(out, at, to, x, y)
                    continue
                a, b = _load(words, at, bits), _load(words, at + LANES, bits)
                for plane in range(min(planes, (rows - row + height - 1) // height)):
                    shift = bits * (planes - 1 - plane)
                    x = (i32_to_f32(a >> shift & mask) - zero_a) * scale_a
                    y = (i32_to_f32(b >> shift & mask) - zero_b) * scale_b
                    write_ahead(out, at + plane * height * columns, to, ahead)
                    put_pair_here(out, at + plane * height * columns, to, x, y)


@kernel
def _rows(
    words: Bytes,
    scales: Bytes,
    zeros: Bytes,
    scale_kind: int,
    zero_kind: int,
    bits: int,
    planes: int,
    rows: int,
    columns: int,
    out: Bytes,
    form: int,
    lo: int,
    hi: int,
) -> None:
    height, mask = (rows + planes - 1) // planes, (1 << bits) - 1
    step, size = max(1, STRIP // columns), 4 if bits == 3 else 1
    strip_zeros, strip_scales = scratch(STRIP, np.float32), scratch(STRIP, np.float32)
    for begin in range(lo, hi, step):
        for plane in range(planes):
            shift = bits * (planes - 1 - plane)
            first, count = plane * height + begin, min(step, hi - begin, rows - plane * height - begin)
            certain = unfold(strip_zeros, zeros, zero_kind, first, count, LEAST)
            certain &= unfold(strip_scales, scales, scale_kind, first, count, LEAST)
            to = without_subnormals(form, certain)
            for row in range(count):
                zero, scale = strip_zeros[row], strip_scales[row]
                for start in range(0, columns, WIDTH):
                    column = min(start, columns - WIDTH)
                    at = (begin + row) * columns + column
                    if plane == 0:
                        read_ahead(words, at * size)
                    if bits == 8:
                        x = (i32_to_f32(load_u8(words, at)) - zero) * scale
                        y = (i32_to_f32(load_u8(words, at + LANES)) - zero) * scale
                    else:
                        x = _weights(_load(words, at, bits) >> shift, mask, zero, scale)
                        y = _weights(_load(words, at + LANES, bits) >> shift, mask, zero, scale)
                    put_pair(out, (first + row) * columns + column, to, x, y)


F32: TypeAlias = npt.NDArray[np.float32]

EXPONENT = reference.EXPONENT
SUMS = reference.SUMS

COLUMNS = 1024
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
    run_ranges(lambda lo, hi: extremes(grid, zero, s, lo, hi), columns, grain=COLUMNS, threads=threads)
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
        lambda lo, hi: pack_codes(grid, s, zero, top, bits, packed, lo, hi), columns, grain=COLUMNS, threads=threads
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
        lanes = np.zeros(SUMS, np.float32)
        for first in range(0, rows, slab):
            last = min(first + slab, rows)
            work = partial(turn, grid, s, zero, top, inverse_beta, idle, sums, errors, first, last)
            run_ranges(work, columns, grain=COLUMNS, threads=threads)
            made = errors[: (last - first) * columns]
            rest = made[len(made) - (grid.size % SUMS if last == rows else 0) :]
            _add_lanes(made[: len(made) - len(rest)], lanes, first * columns % SUMS, threads)
        beta *= reference.KAPPA
        current = reference.mean_of_lanes(lanes, rest, grid.size)
        if not current < best:
            break
        best = current


def _add_lanes(errors: F32, lanes: F32, phase: int, threads: int | None) -> None:
    """The running sums of :func:`uqff.families.hqq.reference.mean_magnitude`; two threads take half of them each."""
    half = SUMS // 2
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
    q = scratch(COLUMNS, np.float32)
    e = scratch(COLUMNS, np.float32)
    total = scratch(COLUMNS, np.float32)
    rows, columns = grid.shape
    mean = np.float32(1.0 / rows)
    for start in range(lo, hi, COLUMNS):
        end = min(start + COLUMNS, hi)
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
    whole = (SUMS - phase) % SUMS
    for i in range(min(whole, errors.size)):
        k = phase + i
        if lo <= k < hi:
            lanes[k] += errors[i]
    end = whole + max(errors.size - whole, 0) // SUMS * SUMS
    for start in range(whole, end, SUMS):
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


def search(w: F32, importance: F32, bits: int) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """See :func:`uqff.families.hqq.reference.search`; both arrays must be C-contiguous."""
    if w.shape[1] > MOST:
        return reference.search(w, importance, bits)
    scales, offsets = np.empty((2, len(w)), np.float32)
    codes = np.empty(w.shape, np.uint8)
    starts, top = reference.STARTS[bits], float(2**bits - 1)
    run_ranges(
        lambda lo, hi: affine_blocks(w, importance, top, starts, FORM, scales, offsets, codes, lo, hi),
        len(w),
        grain=256,
    )
    with np.errstate(all="ignore"):
        return codes, scales, -offsets / scales
