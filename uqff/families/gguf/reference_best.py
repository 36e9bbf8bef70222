"""The ggml types with codes and scales of least weighted squared error: the reference, slow and obvious.

The legacy types and Q8K are :mod:`uqff.numerics.fitting` as it is.  Of a K type first every sub-block is fitted alone.
Then the unit of the sub-blocks' scales is fitted to those scales (and that of the minimums to the minimums), each
weighted with what its error costs.  Now in turn, with the stored units: every sub-block tries the neighbours of its
whole-numbered scale and minimum on all of its weights; and for all codes, scales and minimums the units are solved for
by least squares.  The best turn of each block counts.

Every function takes float32 blocks ``[n_blocks, block_size]`` and weights alike, and returns what
:mod:`uqff.families.gguf.assemble` puts together.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import assemble
from uqff.numerics.fitting import (
    F16,
    F32,
    SINGULAR,
    Wide,
    affine_starts,
    fit_affine,
    fit_scale,
    inverse,
    nearest_codes,
    quantize_affine,
    quantize_scaled,
    scale_starts,
    stored,
    total,
)

__all__ = ["AFFINE", "K_AFFINE", "K_SCALED", "ROUNDS", "SCALED", "Affine", "KAffine", "KScaled", "Scaled", "quantize"]

Blocks: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
Codes: TypeAlias = npt.NDArray[np.signedinteger[Any] | np.unsignedinteger[Any]]
"""As int32 or in bytes."""
U8: TypeAlias = npt.NDArray[np.uint8]

ROUNDS: Final = 3
"""Turns between the sub-blocks and the units of a super-block."""


class Scaled(NamedTuple):
    """A type ``d * code``: codes from ``low`` to ``high``, stored plus ``bias``."""

    low: int
    high: int
    bias: int
    form: int
    starts: Wide


class Affine(NamedTuple):
    """A type ``d * code + m``: codes from 0 to ``top``."""

    top: int
    starts: Wide


class KAffine(NamedTuple):
    """A type ``d * scale * code - dmin * minimum``: codes to ``top``, scales and minimums to ``limit``."""

    size: int
    top: int
    limit: int
    starts: Wide
    units: Wide


class KScaled(NamedTuple):
    """A type ``d * scale * code``, sub-blocks of 16: codes and scales from ``low`` to ``high``, stored plus the bias.

    ``window``: what is added to a sub-block's scale to try it; the first is 0.
    """

    low: int
    high: int
    scale_low: int
    scale_high: int
    scale_bias: int
    window: Wide
    starts: Wide
    units: Wide


SCALED: Final = {
    "Q4_0": Scaled(-8, 7, 8, F16, scale_starts(-8, widest=1.08, narrowest=0.66, count=16)),
    "Q5_0": Scaled(-16, 15, 16, F16, scale_starts(-16, widest=1.06, narrowest=0.78, count=18)),
    "Q8_0": Scaled(-128, 127, 0, F16, scale_starts(-128, widest=1.004, narrowest=0.97, count=6)),
    "Q8_1": Scaled(-128, 127, 0, F16, scale_starts(-128, widest=1.004, narrowest=0.97, count=6)),
    "Q8K": Scaled(-128, 127, 0, F32, scale_starts(-128, widest=1.004, narrowest=0.97, count=12)),
}

AFFINE: Final = {
    "Q4_1": Affine(15, affine_starts(15, most=0.065, count=5, apart=3)),
    "Q5_1": Affine(31, affine_starts(31, most=0.04, count=5, apart=3)),
}

NEAR: Final = np.array([0.0, -1.0, 1.0])
"""What is added to the scale and to the minimum of a sub-block to try them."""

K_AFFINE: Final = {
    "Q2K": KAffine(16, 3, 15, affine_starts(3, most=0.28, count=6), scale_starts(15, 1.08, 0.7, 20, (1,))),
    "Q4K": KAffine(32, 15, 63, affine_starts(15, most=0.07, count=5), scale_starts(63, 1.02, 0.9, 8, (1,))),
    "Q5K": KAffine(32, 31, 63, affine_starts(31, most=0.04, count=5), scale_starts(63, 1.02, 0.9, 8, (1,))),
}

K_SCALED: Final = {
    "Q3K": KScaled(-4, 3, -32, 31, 32, NEAR, scale_starts(-4, 1.15, 0.55, 14), scale_starts(-32, 1.05, 0.85, 10)),
    "Q6K": KScaled(
        -32,
        31,
        -128,
        127,
        0,
        np.array([0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0]),
        scale_starts(-32, 1.02, 0.88, 12),
        scale_starts(-128, 1.0, 0.98, 3),
    ),
}


def quantize(name: str, x: Blocks, w: Blocks) -> U8:
    """Blocks uint8 ``[n_blocks, type_size]`` of a type."""
    with np.errstate(all="ignore"):
        wide, weights = _columns(x, x.shape[1]), _columns(w, x.shape[1])
        if name in SCALED:
            scaled = SCALED[name]
            d, q = quantize_scaled(wide, weights, scaled.low, scaled.high, scaled.starts, scaled.form)
            return put_scaled(name, d, q.astype(np.int32) + scaled.bias)
        if name in AFFINE:
            affine = AFFINE[name]
            d, m, q = quantize_affine(wide, weights, affine.top, affine.starts, F16)
            return put_affine(name, d, m, q.astype(np.int32))
        if name in K_AFFINE:
            return put_k_affine(name, *search_k_affine(x, w, K_AFFINE[name]))
        return put_k_scaled(name, *search_k_scaled(x, w, K_SCALED[name]))


def put_scaled(name: str, d: Blocks, q: Codes) -> U8:
    """Blocks of a type of :data:`SCALED`."""
    return getattr(assemble, name.lower())(d, q)  # type: ignore[no-any-return]


def put_affine(name: str, d: Blocks, m: Blocks, q: Codes) -> U8:
    """Blocks of a type of :data:`AFFINE`."""
    return getattr(assemble, name.lower())(d, m, q)  # type: ignore[no-any-return]


def put_k_affine(name: str, d: Blocks, dmin: Blocks, scales: I32, mins: I32, q: Codes) -> U8:
    """Blocks of a type of :data:`K_AFFINE`."""
    return getattr(assemble, name.lower())(d, dmin, scales, mins, q)  # type: ignore[no-any-return]


def put_k_scaled(name: str, d: Blocks, scales: I32, q: Codes) -> U8:
    """Blocks of a type of :data:`K_SCALED`."""
    kind = K_SCALED[name]
    multiples = scales + kind.scale_bias if kind.scale_bias else scales.astype(np.int8)
    return getattr(assemble, name.lower())(d, multiples, q - q.dtype.type(kind.low))  # type: ignore[no-any-return]


def search_k_affine(x: Blocks, w: Blocks, kind: KAffine) -> tuple[Blocks, Blocks, I32, I32, I32]:
    """D and dmin ``[n]``, scales and minimums ``[256 / size, n]``, codes ``[256, n]``."""
    per_block, limit = 256 // kind.size, float(kind.limit)
    tx, tw = _columns(x, kind.size), _columns(w, kind.size)

    def codes(step: Wide, minimum: Wide) -> Wide:
        return nearest_codes((tx + minimum) * inverse(step), 0.0, kind.top)

    scale, offset = fit_affine(tx, tw, kind.top, kind.starts, free=False)
    q = codes(scale, -offset)
    sum_w, squares = total(tw), total(tw * q * q)
    d = stored(fit_scale(_grouped(scale, per_block), _grouped(squares, per_block), 0, limit, kind.units), F16)
    dmin = stored(fit_scale(_grouped(-offset, per_block), _grouped(sum_w, per_block), 0, limit, kind.units), F16)
    spread_d, spread_dmin = (np.repeat(each.astype(np.float64), per_block) for each in (d, dmin))
    ls = nearest_codes(scale * inverse(spread_d), 0.0, limit)
    lm = nearest_codes(-offset * inverse(spread_dmin), 0.0, limit)
    best = np.full(len(x), np.inf)
    kept_d, kept_dmin, kept_ls, kept_lm = d, dmin, ls, lm
    sum_x = total(tw * tx)
    for turn in range(ROUNDS):
        around = ls, lm
        error = np.full(ls.shape, np.inf)
        for more in NEAR:
            for less in NEAR:
                try_ls, try_lm = np.clip(around[0] + more, 0, limit), np.clip(around[1] + less, 0, limit)
                step, minimum = spread_d * try_ls, spread_dmin * try_lm
                e = tx - (codes(step, minimum) * step - minimum)
                e = total(tw * e * e)
                better = e < error
                error = np.where(better, e, error)
                ls, lm = np.where(better, try_ls, ls), np.where(better, try_lm, lm)
        block = total(_grouped(error, per_block))
        better = block < best
        best = np.where(better, block, best)
        subs = np.repeat(better, per_block)
        kept_d, kept_dmin = np.where(better, d, kept_d), np.where(better, dmin, kept_dmin)
        kept_ls, kept_lm = np.where(subs, ls, kept_ls), np.where(subs, lm, kept_lm)
        if turn + 1 == ROUNDS:
            break
        q = codes(spread_d * ls, spread_dmin * lm)
        wq = tw * q
        a = total(_grouped(ls * ls * total(wq * q), per_block))
        b = total(_grouped(ls * lm * total(wq), per_block))
        c = total(_grouped(lm * lm * sum_w, per_block))
        p = total(_grouped(ls * total(tw * tx * q), per_block))
        r = total(_grouped(lm * sum_x, per_block))
        d, dmin = solve_units(a, b, c, p, r, d, dmin)
        spread_d, spread_dmin = (np.repeat(each.astype(np.float64), per_block) for each in (d, dmin))
    d, dmin, ls, lm = kept_d, kept_dmin, kept_ls, kept_lm
    spread_d, spread_dmin = (np.repeat(each.astype(np.float64), per_block) for each in (d, dmin))
    q = codes(spread_d * ls, spread_dmin * lm).T.reshape(-1, 256).T
    whole = (_grouped(each, per_block).astype(np.int32) for each in (ls, lm))
    return d, dmin, *whole, q.astype(np.int32)


def solve_units(a: Wide, b: Wide, c: Wide, p: Wide, r: Wide, d: Blocks, dmin: Blocks) -> tuple[Blocks, Blocks]:
    """``d * a - dmin * b = p`` and ``d * b - dmin * c = r`` solved and stored; without a sound solution, as before.

    A dmin below zero becomes 0, and so it stays where no block has minimums.
    """
    determinant = a * c - b * b
    regular = determinant > SINGULAR * (a * c)
    inverted = inverse(determinant)
    unit, least = (p * c - r * b) * inverted, (p * b - r * a) * inverted
    alone = (c == 0) | (regular & (least < 0))
    unit, least = np.where(alone, p * inverse(a), unit), np.where(alone, 0.0, least)
    sound = (regular | alone) & (unit > 0)
    return np.where(sound, stored(unit, F16), d), np.where(sound, stored(least, F16), dmin)


def search_k_scaled(x: Blocks, w: Blocks, kind: KScaled) -> tuple[Blocks, I32, I32]:
    """D ``[n]``, scales ``[16, n]``, codes ``[256, n]``."""
    tx, tw = _columns(x, 16), _columns(w, 16)
    low, high = float(kind.scale_low), float(kind.scale_high)

    def codes(step: Wide) -> Wide:
        return nearest_codes(tx * inverse(step), kind.low, kind.high)

    scale = fit_scale(tx, tw, kind.low, kind.high, kind.starts)
    q = codes(scale)
    squares = total(tw * q * q)
    d = stored(fit_scale(_grouped(scale, 16), _grouped(squares, 16), low, high, kind.units), F16)
    spread_d = np.repeat(d.astype(np.float64), 16)
    ls = nearest_codes(scale * inverse(spread_d), low, high)
    best = np.full(len(x), np.inf)
    kept_d, kept_ls = d, ls
    for turn in range(ROUNDS):
        around = ls
        error = np.full(ls.shape, np.inf)
        for more in kind.window:
            try_ls = np.clip(around + more, low, high)
            step = spread_d * try_ls
            e = tx - codes(step) * step
            e = total(tw * e * e)
            better = e < error
            error, ls = np.where(better, e, error), np.where(better, try_ls, ls)
        block = total(_grouped(error, 16))
        better = block < best
        best = np.where(better, block, best)
        kept_d, kept_ls = np.where(better, d, kept_d), np.where(np.repeat(better, 16), ls, kept_ls)
        if turn + 1 == ROUNDS:
            break
        q = codes(spread_d * ls)
        a = total(_grouped(ls * ls * total(tw * q * q), 16))
        p = total(_grouped(ls * total(tw * tx * q), 16))
        d = np.where(a > 0, stored(p * inverse(a), F16), d)
        spread_d = np.repeat(d.astype(np.float64), 16)
    d, ls = kept_d, kept_ls
    q = codes(np.repeat(d.astype(np.float64), 16) * ls).T.reshape(-1, 256).T
    return d, _grouped(ls, 16).astype(np.int32), q.astype(np.int32)


def _columns(x: Blocks, size: int) -> Wide:
    """Blocks or sub-blocks as the columns of a float64 matrix ``[size, n]``."""
    return np.ascontiguousarray(x.reshape(-1, size).T).astype(np.float64)


def _grouped(values: Wide, per_block: int) -> Wide:
    """What every sub-block has, ``[n * per_block]``, as ``[per_block, n]``."""
    grouped: Wide = values.reshape(-1, per_block).T
    return grouped
