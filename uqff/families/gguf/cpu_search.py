"""The search of Q2K, Q4K and Q5K: the fast twin of ``search_scale_and_min`` of ``uqff.families.gguf.search``.

It runs on a tile of ``SUB_BLOCKS`` at once, transposed so that a row holds one element of each. The loop
over lanes is the inner one and becomes vector instructions; every lane keeps the scalar order of its sums. A lane whose
search has ended goes on with the others, but its result is fixed. Values are loaded into variables before a choice
between them: a choice between array elements would become a gather.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.simd.arithmetic import ONE, ZERO, unsigned_code
from uqff.simd.compiling import inline

SUB_BLOCKS = 64
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
    for lane in range(blocks * per_block, SUB_BLOCKS):
        for i in range(size):
            tile[i, lane] = ZERO


@inline
def search_scale_and_min(tile, codes, state, top, scale, minimum):
    """``search_scale_and_min`` of ``families.gguf.search``, per lane.

    ``state`` is seven rows of lanes. Rows of one array would fail the compiled check that they do not overlap.
    """
    size = tile.shape[0]
    low, step, inverse, sumlx, suml2, searching, changed = state
    for lane in range(SUB_BLOCKS):
        low[lane] = tile[0, lane]
        step[lane] = tile[0, lane]
    for i in range(1, size):
        for lane in range(SUB_BLOCKS):
            v, least, greatest = tile[i, lane], low[lane], step[lane]
            low[lane] = v if v < least else least
            step[lane] = v if v > greatest else greatest
    for lane in range(SUB_BLOCKS):
        least, greatest = low[lane], step[lane]
        searching[lane] = ONE if least < greatest else ZERO
        least = least if least < ZERO else ZERO
        low[lane] = least
        inverse[lane] = top / (greatest - least)
        scale[lane] = ZERO
        minimum[lane] = ZERO
    for i in range(size):
        for lane in range(SUB_BLOCKS):
            codes[i, lane] = ZERO
    for _ in range(5):
        for lane in range(SUB_BLOCKS):
            sumlx[lane] = ZERO
            suml2[lane] = ZERO
            changed[lane] = ZERO
        for i in range(size):
            for lane in range(SUB_BLOCKS):
                shifted = tile[i, lane] - low[lane]
                code = unsigned_code(inverse[lane] * shifted, top)
                differs = changed[lane]
                changed[lane] = differs if code == codes[i, lane] else ONE
                codes[i, lane] = code
                sumlx[lane] += shifted * code
                suml2[lane] += code * code
        for lane in range(SUB_BLOCKS):
            step[lane] = sumlx[lane] / suml2[lane]
            low[lane] = ZERO
        for i in range(size):
            for lane in range(SUB_BLOCKS):
                low[lane] += tile[i, lane] - step[lane] * codes[i, lane]
        left = np.int32(0)
        for lane in range(SUB_BLOCKS):
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
