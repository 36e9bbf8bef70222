"""The searches of the K quantisers: the fast twins of those in ``uqff.families.gguf.search``.

A search runs on a tile of ``LANES`` sub-blocks at once, transposed so that a row holds one element of each. The loop
over lanes is the inner one and becomes vector instructions; every lane keeps the scalar order of its sums. A lane whose
search has ended goes on with the others, but its result is fixed. Values are loaded into variables before a choice
between them: a choice between array elements would become a gather.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.kernels.arithmetic import ONE, ZERO, signed_code, unsigned_code
from uqff.kernels.compiling import inline

LANES = 64
"""Sub-blocks of a tile: four AVX-512 registers to a row, enough to hide the latency of a division."""


@inline
def load_tile(x, block, blocks, tile):
    """Sub-blocks from ``block`` on, transposed to ``[element, lane]``; lanes after the last sub-block are zero."""
    size = tile.shape[0]
    per_block = 256 // size
    for b in range(blocks):
        for j in range(per_block):
            sub_block = x[block + b, j * size : (j + 1) * size]
            for i in range(size):
                tile[i, b * per_block + j] = sub_block[i]
    for lane in range(blocks * per_block, LANES):
        for i in range(size):
            tile[i, lane] = ZERO


@inline
def largest_of_lanes(tile, largest):
    for lane in range(LANES):
        largest[lane] = ZERO
    for i in range(tile.shape[0]):
        for lane in range(LANES):
            v, top = tile[i, lane], largest[lane]
            largest[lane] = v if abs(v) > abs(top) else top


@inline
def search_rows():
    """Seven rows of lanes. Rows of one array would fail the compiled check that they do not overlap."""
    return (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )


@inline
def search_scale_and_min(tile, codes, state, top, scale, minimum):
    """``search_scale_and_min`` of ``families.gguf.search``, per lane."""
    size = tile.shape[0]
    low, step, inverse, sumlx, suml2, searching, changed = state
    for lane in range(LANES):
        low[lane] = tile[0, lane]
        step[lane] = tile[0, lane]
    for i in range(1, size):
        for lane in range(LANES):
            v, least, greatest = tile[i, lane], low[lane], step[lane]
            low[lane] = v if v < least else least
            step[lane] = v if v > greatest else greatest
    for lane in range(LANES):
        least, greatest = low[lane], step[lane]
        searching[lane] = ONE if least < greatest else ZERO
        least = least if least < ZERO else ZERO
        low[lane] = least
        inverse[lane] = top / (greatest - least)
        scale[lane] = ZERO
        minimum[lane] = ZERO
    for i in range(size):
        for lane in range(LANES):
            codes[i, lane] = ZERO
    for _ in range(5):
        for lane in range(LANES):
            sumlx[lane] = ZERO
            suml2[lane] = ZERO
            changed[lane] = ZERO
        for i in range(size):
            for lane in range(LANES):
                shifted = tile[i, lane] - low[lane]
                code = unsigned_code(inverse[lane] * shifted, top)
                differs = changed[lane]
                changed[lane] = differs if code == codes[i, lane] else ONE
                codes[i, lane] = code
                sumlx[lane] += shifted * code
                suml2[lane] += code * code
        for lane in range(LANES):
            step[lane] = sumlx[lane] / suml2[lane]
            low[lane] = ZERO
        for i in range(size):
            for lane in range(LANES):
                low[lane] += tile[i, lane] - step[lane] * codes[i, lane]
        left = np.int32(0)
        for lane in range(LANES):
            active, differs, found, old_scale, old_minimum = (
                searching[lane],
                changed[lane],
                step[lane],
                scale[lane],
                minimum[lane],
            )
            least = low[lane] / np.float32(size)
            least = ZERO if least > ZERO else least
            low[lane] = least
            inverse[lane] = ONE / found
            scale[lane] = found if active != ZERO else old_scale
            minimum[lane] = -least if active != ZERO else old_minimum
            active = active * differs
            searching[lane] = active
            left = np.int32(left | np.int32(active != ZERO))
        if left == 0:
            break


@inline
def q3_square(w, code):
    return w * (code * code)


@inline
def q6_square(w, code):
    return w * code * code


@inline
def descend(weighted, codes, sumlx, suml2, top, weighted_square):
    """``descend`` of ``families.gguf.search``, per lane. A lane nothing changes in any more stays so by itself."""
    for _ in range(5):
        changed = np.int32(0)
        for i in range(16):
            for lane in range(LANES):
                v, w, wv = weighted[0, i, lane], weighted[1, i, lane], weighted[2, i, lane]
                code, old_slx, old_sl2 = codes[i, lane], sumlx[lane], suml2[lane]
                slx = old_slx - wv * code
                sl2 = old_sl2 - weighted_square(w, code)
                entered = slx > ZERO
                new = signed_code(v * sl2 / slx, -top, top - ONE)
                slx += wv * new
                sl2 += weighted_square(w, new)
                gain = slx * slx * old_sl2 > old_slx * old_slx * sl2
                better = entered & (new != code) & (sl2 > ZERO) & gain
                codes[i, lane] = new if better else code
                sumlx[lane] = slx if better else old_slx
                suml2[lane] = sl2 if better else old_sl2
                changed = np.int32(changed | np.int32(better))
        if changed == 0:
            break


@inline
def weigh(weighted):
    """The squares, with which elements are weighted, and the cubes of a tile, which is ``weighted[0]``.

    They lie in one array because LLVM checks for overlap in pairs, and gives up vectorising after eight.
    """
    for i in range(16):
        for lane in range(LANES):
            v = weighted[0, i, lane]
            w = v * v
            weighted[1, i, lane] = w
            weighted[2, i, lane] = w * v


@inline
def start_search(weighted, codes, inverse, sumlx, suml2, top, weighted_square):
    """Codes ``round(inverse * x)`` and their two sums."""
    for lane in range(LANES):
        sumlx[lane] = ZERO
        suml2[lane] = ZERO
    for i in range(16):
        for lane in range(LANES):
            code = signed_code(inverse[lane] * weighted[0, i, lane], -top, top - ONE)
            codes[i, lane] = code
            sumlx[lane] += weighted[2, i, lane] * code
            suml2[lane] += weighted_square(weighted[1, i, lane], code)


@inline
def rescale(weighted, codes, tried, inverse, sums):
    """The rescaling tries of ``search_q6_scale`` of ``families.gguf.search``, per lane."""
    sumlx, suml2, slx, sl2, changed = sums
    for _ in range(3):
        for lane in range(LANES):
            inverse[lane] = ONE / (sumlx[lane] / suml2[lane])
            changed[lane] = ZERO
        start_search(weighted, tried, inverse, slx, sl2, np.float32(32), q6_square)
        for i in range(16):
            for lane in range(LANES):
                differs = changed[lane]
                changed[lane] = differs if tried[i, lane] == codes[i, lane] else ONE
        improved = np.int32(0)
        for lane in range(LANES):
            old_slx, old_sl2, new_slx, new_sl2 = sumlx[lane], suml2[lane], slx[lane], sl2[lane]
            best = old_slx / old_sl2 * old_slx
            kept = (changed[lane] == ZERO) | (new_sl2 == ZERO) | (new_slx * new_slx <= best * new_sl2)
            changed[lane] = ZERO if kept else ONE
            sumlx[lane] = old_slx if kept else new_slx
            suml2[lane] = old_sl2 if kept else new_sl2
            improved = np.int32(improved | (np.int32(1) - np.int32(kept)))
        if improved == 0:
            break
        for i in range(16):
            for lane in range(LANES):
                old, new, accepted = codes[i, lane], tried[i, lane], changed[lane]
                codes[i, lane] = old if accepted == ZERO else new
