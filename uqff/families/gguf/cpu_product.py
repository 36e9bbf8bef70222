"""Kernels of the engine's products: the twins of :mod:`uqff.families.gguf.reference_product`, equal bit for bit.

Activations are laid out once for all rows of a weight: :mod:`uqff.families.gguf.cpu_activations`.

Unsigned codes of a weight are multiplied as they are stored; what their offset adds up to is subtracted afterwards.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import cpu_dequantize as at_
from uqff.families.gguf.blocks import BLOCK_TYPES, QK, QK_K, BlockType
from uqff.families.gguf.cpu_activations import BESIDE, laid_out, lay_out
from uqff.families.gguf.reference_product import ACTIVATIONS
from uqff.simd.arithmetic import ZERO
from uqff.simd.chain import Task
from uqff.simd.compiling import inline
from uqff.simd.crew import Shared
from uqff.simd.dots import (
    as_words,
    evens_and_odds,
    first_half_twice,
    half_8,
    last_half_doubled,
    load_codes,
    load_i8_words,
    load_sums,
    load_twice,
    load_u8_words,
    load_words,
    masker,
    of_row,
    pairs,
    picker,
    quads,
    scaled_quads,
    shifter,
    signed_high_bytes,
    signed_quads,
    spread_8,
    to_floats,
    total_8,
    two_halves_8,
    word_of_halves,
)
from uqff.simd.load_store import load_bytes, load_nibbles, load_u32
from uqff.simd.output import f16, f32, read_ahead
from uqff.simd.vectors import ROWS, spread_bits

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF
    from uqff.families.multiplying import EngineProduct

__all__ = ["product", "task"]

F32 = npt.NDArray[np.float32]

GRAIN = 1 << 19
"""Products of two codes that a range has at least: some 30 µs, about what a second thread costs."""

AWAKE = 4
"""How much less that is in a chain, where threads are awake."""

SEVERAL = 3
"""Rows of activations from which codes are unpacked for :data:`ROWS` of them at once, even if one of these is twice."""

NAN = np.float32(np.nan)


@inline
def _number(y):
    """As it is; a NaN without sign and payload, which differ between CPUs."""
    return y if y == y else NAN


class Product:
    """The kernel of one type, compiled when it is first needed.

    Attributes:
        block_type: which type.
    """

    def __init__(self, block_type: BlockType, block: Callable[..., Any], minimum: int | None = None) -> None:
        """What a block gives.

        Args:
            block_type: which type.
            block: ``(data, at, codes, from, beside, from) -> (I32_8, I32_8)``: sums of the block of a weight at a byte
                with one of activations; the second of minimums, for K types.
            minimum: where a block has the float that is multiplied with those; None if it has none.
        """
        self.block_type = block_type
        self._block = inline(block)
        self._minimum = minimum

    @cached_property
    def multiply(self) -> Shared:
        """``(data, codes, scales, beside, y, first, lo, hi)``: rows ``[lo, hi)`` of ``y``, of the weight from first."""
        types, block, kept = self.block_type, self._block, BESIDE[ACTIVATIONS[self.block_type.name].name]
        type_size, size, minimum = types.type_size, types.block_size, self._minimum or 0
        d_at = types.layout.offsets[[name for name, _, _ in types.layout.members].index("d")]
        whole = types.name == "Q8K"
        steps = range(0, type_size, 64)
        far = len(steps)

        def plain(data, codes, scales, beside, y, first, lo, hi):
            blocks = scales.shape[1]
            for row in range(lo, hi):
                for r in range(len(y)):
                    given, ds, more, sums = codes[r], scales[r], beside[r], spread_8(ZERO)
                    for b in range(blocks):
                        at = type_size * ((first + row) * blocks + b)
                        for k in range(far):
                            read_ahead(data, at + 64 * k)
                        found, _ = block(data, at, given, size * b, more, kept * b)
                        d = spread_8(f32(data, at + d_at) * ds[b]) if whole else half_8(data, at + d_at, ds[b])
                        sums = sums + to_floats(found) * d
                    y[r, row] = _number(total_8(sums))

        def legacy(data, codes, scales, beside, y, first, lo, hi):
            blocks = scales.shape[1]
            for row in range(lo, hi):
                for r in range(len(y)):
                    given, ds, more, sums, others = codes[r], scales[r], beside[r], spread_8(ZERO), ZERO
                    for b in range(blocks):
                        at = type_size * ((first + row) * blocks + b)
                        read_ahead(data, at)
                        found, _ = block(data, at, given, size * b, more, kept * b)
                        sums = sums + to_floats(found) * half_8(data, at + d_at, ds[b])
                        others += f16(data, at + minimum) * f32(more, kept * b)
                    y[r, row] = _number(total_8(sums) + others)

        def affine(data, codes, scales, beside, y, first, lo, hi):
            blocks = scales.shape[1]
            for row in range(lo, hi):
                for r in range(len(y)):
                    given, ds, more, sums = codes[r], scales[r], beside[r], spread_8(ZERO)
                    for b in range(blocks):
                        at = type_size * ((first + row) * blocks + b)
                        for k in range(far):
                            read_ahead(data, at + 64 * k)
                        found, least = block(data, at, given, size * b, more, kept * b)
                        d, m = two_halves_8(data, at + d_at, ds[b])
                        sums = sums + to_floats(found) * d
                        sums = sums - to_floats(least) * m
                    y[r, row] = _number(total_8(sums))

        chosen = plain if self._minimum is None else legacy if size == QK else affine
        chosen.__qualname__ = f"gguf{types.name}.multiply"
        return Shared(chosen)

    @property
    def takes_several(self) -> bool:
        """Whether there is :attr:`multiply_several`: not for those whose minimum is a float beside each sum."""
        return self._minimum is None or self.block_type.block_size == QK_K

    @cached_property
    def multiply_several(self) -> Shared:
        """:attr:`multiply` that unpacks the codes of a block once for :data:`ROWS` rows of activations, the same bits.

        Where there are no such many left, the last one is taken again.
        """
        types, block, kept = self.block_type, self._block, BESIDE[ACTIVATIONS[self.block_type.name].name]
        type_size, size = types.type_size, types.block_size
        affine, whole = self._minimum is not None, types.name == "Q8K"
        d_at = types.layout.offsets[[name for name, _, _ in types.layout.members].index("d")]
        far = len(range(0, type_size, 64))

        @inline
        def added(sums, found, least, data, at, scale):
            if affine:
                d, m = two_halves_8(data, at + d_at, scale)
                return sums + to_floats(found) * d - to_floats(least) * m
            d = spread_8(f32(data, at + d_at) * scale) if whole else half_8(data, at + d_at, scale)
            return sums + to_floats(found) * d

        def multiply_several(data, codes, scales, beside, y, first, lo, hi):
            blocks, last = scales.shape[1], len(y) - 1
            for row in range(lo, hi):
                for r in range(0, len(y), ROWS):
                    r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
                    given = codes[r], codes[r1], codes[r2], codes[r3]
                    more = beside[r], beside[r1], beside[r2], beside[r3]
                    sums = sums1 = sums2 = sums3 = spread_8(ZERO)
                    for b in range(blocks):
                        at = type_size * ((first + row) * blocks + b)
                        for k in range(far):
                            read_ahead(data, at + 64 * k)
                        found, least = block(data, at, given, size * b, more, kept * b)
                        sums = added(sums, of_row(found, 0), of_row(least, 0), data, at, scales[r, b])
                        sums1 = added(sums1, of_row(found, 1), of_row(least, 1), data, at, scales[r1, b])
                        sums2 = added(sums2, of_row(found, 2), of_row(least, 2), data, at, scales[r2, b])
                        sums3 = added(sums3, of_row(found, 3), of_row(least, 3), data, at, scales[r3, b])
                    y[r, row], y[r1, row] = _number(total_8(sums)), _number(total_8(sums1))
                    y[r2, row], y[r3, row] = _number(total_8(sums2)), _number(total_8(sums3))

        multiply_several.__qualname__ = f"gguf{types.name}.multiply_several"
        return Shared(multiply_several)


PRODUCTS: dict[str, Product] = {}
"""By the type's name."""

_BY_NAME = {each.name: each for each in BLOCK_TYPES}


def _product(name: str, minimum: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(block: Callable[..., Any]) -> Callable[..., Any]:
        PRODUCTS[name] = Product(_BY_NAME[name], block, minimum)
        return block

    return keep


@_product("Q4_0")
def _q4_0(data, at, codes, i, beside, j):
    found = quads(load_nibbles(data, at + at_.Q4_0_QS), load_codes(codes, i))
    return found - load_sums(beside, j), found


@_product("Q4_1", at_.Q4_1_M)
def _q4_1(data, at, codes, i, beside, j):
    found = quads(load_nibbles(data, at + at_.Q4_1_QS), load_codes(codes, i))
    return found, found


@_product("Q5_0")
def _q5_0(data, at, codes, i, beside, j):
    given = load_nibbles(data, at + at_.Q5_0_QS) | spread_bits(load_u32(data, at + at_.Q5_0_QH), 16)
    found = quads(given, load_codes(codes, i))
    return found - load_sums(beside, j), found


@_product("Q5_1", at_.Q5_1_M)
def _q5_1(data, at, codes, i, beside, j):
    given = load_nibbles(data, at + at_.Q5_1_QS) | spread_bits(load_u32(data, at + at_.Q5_1_QH), 16)
    found = quads(given, load_codes(codes, i))
    return found, found


@_product("Q8_0")
def _q8_0(data, at, codes, i, beside, j):
    found = signed_quads(load_bytes(data, at + at_.Q8_0_QS), load_codes(codes, i))
    return found, found


@_product("Q8_1")
def _q8_1(data, at, codes, i, beside, j):
    found = signed_quads(load_bytes(data, at + at_.Q8_1_QS), load_codes(codes, i))
    return found, found


@inline
def _four_planes(qs, codes, i, scales, a, b, c, d):
    """Codes of two bits in four planes, those of 128 numbers; each has two scales."""
    found = scaled_quads(qs & 3, load_codes(codes, i), word_of_halves(scales, a))
    found = found + scaled_quads(qs >> 2 & 3, load_codes(codes, i + 32), word_of_halves(scales, b))
    found = found + scaled_quads(qs >> 4 & 3, load_codes(codes, i + 64), word_of_halves(scales, c))
    return found + scaled_quads(qs >> 6, load_codes(codes, i + 96), word_of_halves(scales, d))


_EVENS_AND_ODDS = (*range(0, 16, 2), *range(1, 16, 2))
_evens_and_odds_low = picker([each for j in _EVENS_AND_ODDS for each in (j, None)])
_evens_and_odds_high = picker([each for j in _EVENS_AND_ODDS for each in (None, j)])


@_product("Q2K", at_.Q2K_DMIN)
def _q2k(data, at, codes, i, beside, j):
    scales = as_words(_evens_and_odds_low(load_twice(data, at + at_.Q2K_SCALES))) & 0x0F
    found = _four_planes(load_bytes(data, at + at_.Q2K_QS), codes, i, scales, 0, 1, 2, 3)
    found = found + _four_planes(load_bytes(data, at + at_.Q2K_QS + 32), codes, i + 128, scales, 4, 5, 6, 7)
    return found, pairs(load_u8_words(data, at + at_.Q2K_SCALES) >> 4, load_words(beside, j))


# The scales of Q3K: low nibbles of eight bytes, then high ones; and two bits each of four more bytes, in turn.
_Q3K_FROM = at_.Q3K_SCALES - 2  # no block has sixteen bytes from its scales on
_q3k_nibbles = picker([each for j in range(16) for each in (2 + j % 8, None)])
_q3k_nibble = shifter([0] * 4 + [4] * 4)
_q3k_tops = picker([each for j in range(16) for each in (None, 10 + j % 4)])
_q3k_top = shifter([4, 4, 6, 6, 8, 8, 10, 10])


@inline
def _scales_q3k(data, at):
    """The 16 six-bit scales, minus 32."""
    packed = load_twice(data, at + _Q3K_FROM)
    nibbles = _q3k_nibble(_q3k_nibbles(packed)) & 0x000F000F
    return as_words(nibbles | _q3k_top(_q3k_tops(packed)) & 0x00300030) - 32


@inline
def _q3k_half(qs, third, codes, i, scales, a, b, c, d):
    found = scaled_quads(qs & 3 | (third & 1) << 2, load_codes(codes, i), word_of_halves(scales, a))
    found = found + scaled_quads(qs >> 2 & 3 | (third & 2) << 1, load_codes(codes, i + 32), word_of_halves(scales, b))
    found = found + scaled_quads(qs >> 4 & 3 | third & 4, load_codes(codes, i + 64), word_of_halves(scales, c))
    return found + scaled_quads(qs >> 6 | third >> 1 & 4, load_codes(codes, i + 96), word_of_halves(scales, d))


@_product("Q3K")
def _q3k(data, at, codes, i, beside, j):
    small = _scales_q3k(data, at)
    scales = evens_and_odds(small)
    third = load_bytes(data, at + at_.Q3K_HMASK)
    found = _q3k_half(load_bytes(data, at + at_.Q3K_QS), third, codes, i, scales, 0, 1, 2, 3)
    found = found + _q3k_half(load_bytes(data, at + at_.Q3K_QS + 32), third >> 4, codes, i + 128, scales, 4, 5, 6, 7)
    return found - (pairs(small, load_words(beside, j)) << 2), found


# Scales and minimums of Q4K and Q5K lie in bytes 4 to 15 of a block: s, m and both, four bytes each. Of the first four,
# s and m have six bits; of the others, both has the lower four, those of the scale first, and s and m the upper two.
_q4k_low = picker([each for j in (*range(4, 8), *range(12, 16), *range(8, 16)) for each in (j, None)])
_q4k_top = picker(
    [each for four in (range(4, 8), range(8, 12)) for each in [None] * 8 + [b for j in four for b in (j, None)]]
)
_q4k_nibble = shifter([0, 0, 0, 0, 0, 0, 4, 4])
_q4k_bits = masker([0x003F003F, 0x003F003F, 0x000F000F, 0x000F000F] * 2)


@inline
def _scales_q4k(data, at):
    """The eight scales, twice; the eight minimums, each twice."""
    packed = load_twice(data, at)
    low = _q4k_bits(_q4k_nibble(_q4k_low(packed)))
    small = as_words(low | _q4k_top(packed) >> 2 & 0x00300030)
    return first_half_twice(small), last_half_doubled(small)


@inline
def _two_nibbles(qs, codes, i, scales, a, b):
    """64 codes: those in the low nibbles, then those in the high ones."""
    found = scaled_quads(qs & 0x0F, load_codes(codes, i), word_of_halves(scales, a))
    return found + scaled_quads(qs >> 4, load_codes(codes, i + 32), word_of_halves(scales, b))


@_product("Q4K", at_.Q4K_DMIN)
def _q4k(data, at, codes, i, beside, j):
    scales, minimums = _scales_q4k(data, at)
    found = _two_nibbles(load_bytes(data, at + at_.Q4K_QS), codes, i, scales, 0, 1)
    found = found + _two_nibbles(load_bytes(data, at + at_.Q4K_QS + 32), codes, i + 64, scales, 2, 3)
    found = found + _two_nibbles(load_bytes(data, at + at_.Q4K_QS + 64), codes, i + 128, scales, 4, 5)
    found = found + _two_nibbles(load_bytes(data, at + at_.Q4K_QS + 96), codes, i + 192, scales, 6, 7)
    return found, pairs(minimums, load_words(beside, j))


@inline
def _q5k_run(qs, fifth, codes, i, scales, a, b):
    found = scaled_quads(qs & 0x0F | (fifth & 1) << 4, load_codes(codes, i), word_of_halves(scales, a))
    return found + scaled_quads(qs >> 4 | (fifth & 2) << 3, load_codes(codes, i + 32), word_of_halves(scales, b))


@_product("Q5K", at_.Q5K_DMIN)
def _q5k(data, at, codes, i, beside, j):
    scales, minimums = _scales_q4k(data, at)
    fifth = load_bytes(data, at + at_.Q5K_QH)
    found = _q5k_run(load_bytes(data, at + at_.Q5K_QS), fifth, codes, i, scales, 0, 1)
    found = found + _q5k_run(load_bytes(data, at + at_.Q5K_QS + 32), fifth >> 2, codes, i + 64, scales, 2, 3)
    found = found + _q5k_run(load_bytes(data, at + at_.Q5K_QS + 64), fifth >> 4, codes, i + 128, scales, 4, 5)
    found = found + _q5k_run(load_bytes(data, at + at_.Q5K_QS + 96), fifth >> 6, codes, i + 192, scales, 6, 7)
    return found, pairs(minimums, load_words(beside, j))


@inline
def _q6k_half(a, b, qh, codes, i, scales, s, t, u, v):
    found = scaled_quads(a & 0x0F | (qh & 0x03) << 4, load_codes(codes, i), word_of_halves(scales, s))
    found = found + scaled_quads(b & 0x0F | (qh & 0x0C) << 2, load_codes(codes, i + 32), word_of_halves(scales, t))
    found = found + scaled_quads(a >> 4 | qh & 0x30, load_codes(codes, i + 64), word_of_halves(scales, u))
    return found + scaled_quads(b >> 4 | qh >> 2 & 0x30, load_codes(codes, i + 96), word_of_halves(scales, v))


@_product("Q6K")
def _q6k(data, at, codes, i, beside, j):
    small = load_i8_words(data, at + at_.Q6K_SCALES)
    scales = signed_high_bytes(_evens_and_odds_high(load_twice(data, at + at_.Q6K_SCALES)))
    a, b = load_bytes(data, at + at_.Q6K_QL), load_bytes(data, at + at_.Q6K_QL + 32)
    found = _q6k_half(a, b, load_bytes(data, at + at_.Q6K_QH), codes, i, scales, 0, 1, 2, 3)
    a, b = load_bytes(data, at + at_.Q6K_QL + 64), load_bytes(data, at + at_.Q6K_QL + 96)
    qh = load_bytes(data, at + at_.Q6K_QH + 32)
    found = found + _q6k_half(a, b, qh, codes, i + 128, scales, 4, 5, 6, 7)
    return found - (pairs(small, load_words(beside, j)) << 5), found


@_product("Q8K")
def _q8k(data, at, codes, i, beside, j):
    found = signed_quads(load_bytes(data, at + at_.Q8K_QS), load_codes(codes, i))
    for k in range(32, QK_K, 32):
        found = found + signed_quads(load_bytes(data, at + at_.Q8K_QS + k), load_codes(codes, i + k))
    return found, found


def product(weight: GGUF) -> EngineProduct:
    """See :meth:`QuantizedTensor.engine_product`."""
    block_type, data = weight.block_type, weight.parts["data"].array()
    outputs, columns = weight.shape
    kernel = PRODUCTS[block_type.name]

    def multiply(x: F32) -> F32:
        rows = len(x)
        shared = kernel.multiply_several if kernel.takes_several and rows >= SEVERAL else kernel.multiply
        y, (codes, scales, beside) = np.empty((rows, outputs), np.float32), lay_out(x, block_type)
        shared((data, codes, scales, beside, y, 0), outputs, grain=max(GRAIN // (columns * max(rows, 1)), 1))
        return y

    return multiply


def task(weight: GGUF, x: F32, y: F32, laid: dict[Hashable, Task]) -> Task:
    """See :meth:`Multiplying.engine_task`."""
    block_type, (outputs, columns) = weight.block_type, weight.shape
    codes, scales, beside = laid_out(x, block_type, laid)
    arguments = weight.parts["data"].array(), codes, scales, beside, y, 0
    return Task(PRODUCTS[block_type.name].multiply, arguments, outputs, max(GRAIN // AWAKE // columns, 1))
