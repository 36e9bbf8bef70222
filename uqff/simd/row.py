"""What a decoder does between its products with one row, in the very bits of torch: norms, gates, angles, sums.

Torch's sum of a row depends on its vectors: with ``lanes`` of them, every four vectors are a line; lines are added up,
sixteen and more at a time; then the vectors of a line, then their lanes.  How many lanes torch has here, whoever calls
this finds out.  Its exponential is SLEEF's: a polynomial of degree 7 after the multiples of ln 2 are gone.

Authority: torch 2.13, ``aten/src/ATen/native/cpu/SumKernel.cpp`` (``multi_row_sum``, ``row_sum``) and
``Activation.cpp`` (``silu_kernel``); SLEEF 3.8, ``sleefsimdsp.c`` (``xexpf``).
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Final

import numpy as np

from uqff.simd.compiling import inline
from uqff.simd.crew import Shared
from uqff.simd.load_store import load_f32, store_f32
from uqff.simd.masks import where
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, as_f32, multiply_add, splat, truncated

__all__ = ["GATED", "VECTORS", "add", "biased", "gate", "keep", "norm", "rotate"]

VECTORS: Final = (8, 16, 4)
"""Lanes that torch's vectors may have."""

GATED: Final = 64
"""What the numbers of a gate are a multiple of, so that torch has no scalars behind its vectors."""

_ILP: Final = 4
_ZERO, _ONE = np.float32(0), np.float32(1)


@inline
def _sum_of_squares(x, n, lanes, line):
    """Of ``n`` numbers; ``line`` is room for four vectors."""
    width = _ILP * lanes
    lines = n // lanes // _ILP
    power, log = 4, 1
    while (1 << log) < lines:
        log += 1
    power = max(power, log // 4)
    step = 1 << power
    mask = step - 1
    for at in range(0, width, LANES):
        a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        i = 0
        while i + step <= lines:
            for _ in range(step):
                v = load_f32(x, i * width + at)
                a = a + v * v
                i += 1
            b, a = b + a, splat(_ZERO)
            if i & (mask << power) == 0:
                c, b = c + b, splat(_ZERO)
                if i & (mask << (2 * power)) == 0:
                    d, c = d + c, splat(_ZERO)
        while i < lines:
            v = load_f32(x, i * width + at)
            a = a + v * v
            i += 1
        store_f32(line, at, a + b + c + d)
    for vector in range(lines * _ILP, n // lanes):
        for k in range(lanes):
            v = x[vector * lanes + k]
            line[k] += v * v
    for j in range(1, _ILP):
        for k in range(lanes):
            line[k] += line[j * lanes + k]
    total = _ZERO
    for i in range(n // lanes * lanes, n):
        total += x[i] * x[i]
    for k in range(lanes):
        total += line[k]
    return total


def _norm(x, weight, eps, lanes, out, lo, hi):
    n, line = len(weight), scratch(64, np.float32)
    for row in range(lo, hi):
        given, made = x[row], out[row]
        mean = _sum_of_squares(given, n, lanes, line) / np.float32(n)
        factor = _ONE / np.sqrt(mean + eps)
        for i in range(n):
            made[i] = weight[i] * (given[i] * factor)


_norm.__qualname__ = "row.norm"
norm = Shared(_norm)
"""``(x, weight, eps, lanes, out)``: rows of ``x``, of at least four vectors, by the root of their mean square."""


def _add(total, x, bias, lo, hi):
    if len(bias):
        for i in range(lo, hi):
            total[i] += x[i] + bias[i]
    else:
        for i in range(lo, hi):
            total[i] += x[i]


_add.__qualname__ = "row.add"
add = Shared(_add)
"""``(total, x, bias)``: ``total += x + bias``; a bias of no numbers is none."""


def _biased(x, bias, lo, hi):
    for i in range(lo, hi):
        x[i] += bias[i]


_biased.__qualname__ = "row.biased"
biased = Shared(_biased)
"""``(x, bias)``: ``x += bias``."""


def _rotate(x, cos, sin, position, out, many, lo, hi):
    at, n = position[0], cos.shape[1]
    half, place = n // 2, at if many else 0
    for head in range(lo, hi):
        given, made = x[head], out[head, place]
        for i in range(half):
            made[i] = given[i] * cos[at, i] + given[half + i] * sin[at, i]
            made[half + i] = given[half + i] * cos[at, half + i] + given[i] * sin[at, half + i]


_rotate.__qualname__ = "row.rotate"
rotate = Shared(_rotate)
"""``(x, cos, sin, position, out, many)``: heads ``[heads, n]``, turned by the angles of a position.

They go to the place of the position in ``out``, ``[heads, places, n]``, or to the first one if there are not many. The
sines of first halves have the other sign.
"""


def _keep(x, position, out, lo, hi):
    for head in range(lo, hi):
        out[head, position[0]] = x[head]


_keep.__qualname__ = "row.keep"
keep = Shared(_keep)
"""``(x, position, out)``: heads to the place of a position."""

_LOG2_E = np.float32(1.442695040888963407359924681001892137426645954152985934135449406931)
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = np.float32(-0.693145751953125), np.float32(-1.428606765330187045e-06)
_LEAST, _MOST = np.float32(-104), np.float32(100)
_TERMS = tuple(
    np.float32(each)
    for each in (
        0.000198527617612853646278381,
        0.00139304355252534151077271,
        0.00833336077630519866943359,
        0.0416664853692054748535156,
        0.166666671633720397949219,
        0.5,
    )
)
_T0, _T1, _T2, _T3, _T4, _T5 = _TERMS
_ROUND = np.float32(3 << 22)
"""What is added and subtracted again is rounded to a whole number."""


@inline
def _exponential(d):
    """Of what is no number, next to nothing."""
    d = where(d > _LEAST, d, splat(_LEAST))
    d = where(d > _MOST, splat(_MOST), d)
    q = d * _LOG2_E + _ROUND - _ROUND
    s = multiply_add(q, splat(_MINUS_LN2_HIGH), d)
    s = multiply_add(q, splat(_MINUS_LN2_LOW), s)
    u = multiply_add(splat(_T0), s, splat(_T1))
    u = multiply_add(u, s, splat(_T2))
    u = multiply_add(u, s, splat(_T3))
    u = multiply_add(u, s, splat(_T4))
    u = multiply_add(u, s, splat(_T5))
    u = splat(_ONE) + multiply_add(s * s, u, s)
    i = truncated(q)
    first = ((i + 256) >> 1) - 128
    return u * as_f32((first + 127) << 23) * as_f32((i - first + 127) << 23)


def _gate(gates, ups, out, lo, hi):
    for block in range(lo, hi):
        for at in range(GATED * block, GATED * (block + 1), LANES):
            x = load_f32(gates, at)
            gated = x / (splat(_ONE) + _exponential(splat(_ZERO) - x))
            store_f32(out, at, gated * load_f32(ups, at))


_gate.__qualname__ = "row.gate"
gate = Shared(_gate)
"""``(gates, ups, out)``: ``SiLU(gates) · ups``, an item of which is :data:`GATED` numbers."""
