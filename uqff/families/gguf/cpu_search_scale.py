"""The searches of Q3K and Q6K: fast twins of ``search_q3_scale`` and ``search_q6_scale`` of ``families.gguf.search``.

A vector holds one element of each of the 16 sub-blocks of a block, so every lane keeps the scalar order of its sums.
The numbers at hand are those of a tile::

    plane  3        x, x * x, x * x * x: the element, its weight, the weighted element
    block  BLOCKS
    row    16       element i of ...
    lane   16       ... sub-block j

Of normal random weights, the first turn of the descent changes a code in one of 12 sub-blocks of Q6K, in one of five of
Q3K, and later turns in ever fewer. So all sub-blocks are tested first, without a division: where no code can change,
the search is over. The others are collected from many blocks into tiles of their own, and only these are descended.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from uqff.simd.arithmetic import BELOW_HALF_BITS, ONE, ZERO
from uqff.simd.compiling import inline
from uqff.simd.load_store import load_f32, store_f32, store_u8, transpose
from uqff.simd.masks import andnot, any_lane, movemask, nowhere, where
from uqff.simd.vectors import as_f32, as_i32, i32_to_f32, splat, truncated

BATCH = 256
"""Blocks from which sub-blocks are collected: enough for full tiles, few enough for the second-level cache."""

BLOCKS = 4
"""Blocks of a tile, worked on in turn: enough to hide the latency of a division."""

PLANE = BLOCKS * 256

UNSETTLED = 16 * BATCH + 1
"""The length of ``unsettled``: one place is written before it is known to count."""

ALMOST_HALF = np.float32(0.49999)
"""What is nearer than this to an integer is so after a few roundings, too."""


class Sums(NamedTuple):
    """What a search keeps of each sub-block. Its codes, until the descent, are ``round(inverse * x)``."""

    inverse: Any
    sumlx: Any
    suml2: Any


class Search(NamedTuple):
    """The room for the search of a batch of blocks. By lane is by sub-block, 16 to a block."""

    tile: Any
    largest: Any
    """By lane: the element of largest magnitude."""
    sums: Any
    """By lane, at last those of the best codes."""
    unsettled: Any
    """Lanes to be descended, in order."""
    codes: Any
    """``[k / 16, row, 16]``: of ``unsettled[k]``, the best codes."""
    improving: Any
    """By block of the tile."""


@inline
def new_sums(lanes):
    return Sums(np.empty(lanes, np.float32), np.empty(lanes, np.float32), np.empty(lanes, np.float32))


@inline
def new_search(unsettled, improving):
    return Search(
        np.empty(3 * PLANE, np.float32),
        np.empty(16 * BATCH, np.float32),
        new_sums(16 * BATCH),
        unsettled,
        np.empty(256 * BATCH, np.float32),
        improving,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@inline
def q3_square(w, code):
    return w * (code * code)


@inline
def q6_square(w, code):
    return w * code * code


@inline
def magnitude(v):
    return as_f32(as_i32(v) & 0x7FFFFFFF)


@inline
def or_zero(v):
    """NaN is 0."""
    return where(v == v, v, splat(ZERO))


@inline
def bounded(v, low, high):
    """``v`` saturated to low..high; NaN is ``low``: one instruction each."""
    v = where(v > low, v, splat(low))
    return where(v < high, v, splat(high))


@inline
def rounded(v):
    """:func:`uqff.simd.arithmetic.half_away`."""
    return truncated(v + as_f32((as_i32(v) & 0x80000000) | BELOW_HALF_BITS))


@inline
def signed_ints(v, low, high):
    """``round(v)`` saturated to low..high; NaN is 0."""
    return rounded(where(v == v, bounded(v, low, high), splat(ZERO)))


# ---------------------------------------------------------------------------------------------------------------------
# All sub-blocks
# ---------------------------------------------------------------------------------------------------------------------


@inline
def load_block(x, start, tile, b):
    """Fills block ``b`` of a tile from 256 numbers; gives the element of largest magnitude of each sub-block."""
    transpose(x, start, tile, 256 * b)
    largest = splat(ZERO)
    top = splat(ZERO)
    for i in range(256 * b, 256 * b + 256, 16):
        v = load_f32(tile, i)
        size = magnitude(v)
        larger = size > top
        largest = where(larger, v, largest)
        top = where(larger, size, top)
        w = v * v
        store_f32(tile, PLANE + i, w)
        store_f32(tile, 2 * PLANE + i, w * v)
    return largest


@inline
def sums_of_codes(tile, b, inverse, top, weighted_square):
    """The sums of the codes ``round(inverse * x)``; ``inverse`` is not NaN.

    Then only the product of infinity and 0 is NaN. The code of such an element does not matter: its weight is 0.
    """
    sumlx = splat(ZERO)
    suml2 = splat(ZERO)
    for i in range(256 * b, 256 * b + 256, 16):
        code = i32_to_f32(rounded(bounded(load_f32(tile, i) * inverse, -top, top - ONE)))
        sumlx = sumlx + load_f32(tile, 2 * PLANE + i) * code
        suml2 = suml2 + weighted_square(load_f32(tile, PLANE + i), code)
    return sumlx, suml2


@inline
def start_search(tile, b, inverse, sums, at, top, weighted_square):
    """Keeps ``inverse`` and its sums for the lanes from ``at`` on."""
    sumlx, suml2 = sums_of_codes(tile, b, inverse, top, weighted_square)
    store_f32(sums.inverse, at, inverse)
    store_f32(sums.sumlx, at, sumlx)
    store_f32(sums.suml2, at, suml2)


@inline
def rescale(search, first):
    """The rescaling tries of ``search_q6_scale``, on a tile of the blocks from ``first`` on.

    The reference does not take the same codes again. Here they may be taken: their sums are the same too.
    """
    tile, sums, improving = search.tile, search.sums, search.improving
    for b in range(BLOCKS):
        improving[b] = True
    for _ in range(3):
        for b in range(BLOCKS):
            if improving[b]:
                at = 16 * (first + b)
                old_slx = load_f32(sums.sumlx, at)
                old_sl2 = load_f32(sums.suml2, at)
                scale = old_slx / old_sl2
                tried = or_zero(splat(ONE) / scale)
                slx, sl2 = sums_of_codes(tile, b, tried, np.float32(32), q6_square)
                kept = (sl2 == ZERO) | (slx * slx <= scale * old_slx * sl2)
                store_f32(sums.inverse, at, where(kept, load_f32(sums.inverse, at), tried))
                store_f32(sums.sumlx, at, where(kept, old_slx, slx))
                store_f32(sums.suml2, at, where(kept, old_sl2, sl2))
                # With the same sums the next try would be this one again.
                improving[b] = any_lane(andnot((slx != old_slx) | (sl2 != old_sl2), kept))


@inline
def note_unsettled(search, b, at, top, weighted_square, count):
    """Adds the lanes from ``at`` on in which the descent could change a code to ``unsettled``; gives their new count.

    A code stays if it is ``round(x * rest_sl2 / rest_slx)``: if ``x * rest_sl2`` is within half of ``rest_slx`` of
    ``code * rest_slx``. Here it must be within 0.49999 of it, more than 2^-17 less. The roundings add up to 66 * 2^-24
    at most, as a code is up to 32; where numbers are subnormal, its products are exact.
    """
    tile = search.tile
    inverse = load_f32(search.sums.inverse, at)
    sumlx = load_f32(search.sums.sumlx, at)
    suml2 = load_f32(search.sums.suml2, at)
    found = nowhere()
    for i in range(256 * b, 256 * b + 256, 16):
        v = load_f32(tile, i)
        code = i32_to_f32(rounded(bounded(v * inverse, -top, top - ONE)))
        rest_slx = sumlx - load_f32(tile, 2 * PLANE + i) * code
        rest_sl2 = suml2 - weighted_square(load_f32(tile, PLANE + i), code)
        stays = magnitude(v * rest_sl2 - code * rest_slx) < rest_slx * ALMOST_HALF
        found = found | andnot(rest_slx > ZERO, stays)
    bits = movemask(found)
    for lane in range(16):
        search.unsettled[count] = at + lane
        count += bits >> lane & 1
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Those that are not settled
# ---------------------------------------------------------------------------------------------------------------------


@inline
def descend_unsettled(x, first, search, count, top, weighted_square):
    """Descends ``count`` sub-blocks of the blocks from ``first`` on, a tile at a time."""
    rows = np.empty(PLANE, np.float32)
    collected = new_sums(16 * BLOCKS)
    for start in range(0, count, 16 * BLOCKS):
        for k in range(16 * BLOCKS):
            lane = search.unsettled[min(start + k, count - 1)]  # after the last lane, the last again
            store_f32(rows, 16 * k, load_f32(x, 256 * first + 16 * lane))
            collected.inverse[k] = search.sums.inverse[lane]
        for b in range(BLOCKS):
            load_block(rows, 256 * b, search.tile, b)
            inverse = load_f32(collected.inverse, 16 * b)
            start_search(search.tile, b, inverse, collected, 16 * b, top, weighted_square)
            for i in range(256 * b, 256 * b + 256, 16):
                code = signed_ints(load_f32(search.tile, i) * inverse, -top, top - ONE)
                store_f32(search.codes, 16 * start + i, i32_to_f32(code))
        descend(search.tile, search.codes, 16 * start, collected, top, weighted_square)
        for k in range(min(16 * BLOCKS, count - start)):
            lane = search.unsettled[start + k]
            search.sums.sumlx[lane] = collected.sumlx[k]
            search.sums.suml2[lane] = collected.suml2[k]


@inline
def descend(tile, codes, at, sums, top, weighted_square):
    """``descend`` of ``families.gguf.search``, per lane. A lane nothing changes in any more stays so by itself."""
    step, end = 0, 16
    while step < end:
        row = 16 * (step & 15)
        changed = nowhere()
        for b in range(BLOCKS):
            i = 256 * b + row
            v = load_f32(tile, i)
            w = load_f32(tile, PLANE + i)
            wv = load_f32(tile, 2 * PLANE + i)
            code = load_f32(codes, at + i)
            old_slx = load_f32(sums.sumlx, 16 * b)
            old_sl2 = load_f32(sums.suml2, 16 * b)
            slx = old_slx - wv * code
            sl2 = old_sl2 - weighted_square(w, code)
            entered = slx > ZERO
            new = i32_to_f32(signed_ints(v * sl2 / slx, -top, top - ONE))
            slx = slx + wv * new
            sl2 = sl2 + weighted_square(w, new)
            gain = slx * slx * old_sl2 > old_slx * old_slx * sl2
            better = entered & (new != code) & (sl2 > ZERO) & gain
            store_f32(codes, at + i, where(better, new, code))
            store_f32(sums.sumlx, 16 * b, where(better, slx, old_slx))
            store_f32(sums.suml2, 16 * b, where(better, sl2, old_sl2))
            changed = changed | better
        step += 1
        # Over after five turns, or after one without a change, wherever it began.
        end = min(step + 16, 80) if any_lane(changed) else end


# ---------------------------------------------------------------------------------------------------------------------
# What was found
# ---------------------------------------------------------------------------------------------------------------------


@inline
def scales(search, b):
    """The scales of the sub-blocks of a block; 0 where all elements are."""
    scale = load_f32(search.sums.sumlx, 16 * b) / load_f32(search.sums.suml2, 16 * b)
    return where(load_f32(search.largest, 16 * b) == ZERO, splat(ZERO), scale)


@inline
def put_codes(x, first, lane, search, k, count, top, codes, at):
    """The codes of one lane, plus ``top``; 0 if all elements are.

    ``k`` is how many of ``count`` unsettled lanes are known to come before this one: 0, or what the last call gave.
    """
    while k < count and search.unsettled[k] < lane:
        k += 1
    if search.largest[lane] == ZERO:
        store_u8(codes, at, splat(0))
    elif k < count and search.unsettled[k] == lane:
        for i in range(16):
            codes[at + i] = np.uint8(search.codes[(k >> 4 << 8) + 16 * i + (k & 15)] + top)
    else:
        v = load_f32(x, 256 * first + 16 * lane)
        code = signed_ints(v * splat(search.sums.inverse[lane]), -top, top - ONE)
        store_u8(codes, at, code + np.int32(top))
    return k
