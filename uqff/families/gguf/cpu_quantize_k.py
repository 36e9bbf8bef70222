"""Quantisers of Q2K, Q3K, Q4K, Q5K and Q6K: the fast twins of those in ``uqff.families.gguf.reference_quantize``."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.families.gguf.cpu_dequantize import (
    Q2K_D,
    Q2K_DMIN,
    Q2K_QS,
    Q2K_SCALES,
    Q3K_D,
    Q3K_HMASK,
    Q3K_QS,
    Q3K_SCALES,
    Q4K_D,
    Q4K_DMIN,
    Q4K_QS,
    Q4K_SCALES,
    Q5K_QH,
    Q5K_QS,
    Q6K_D,
    Q6K_QH,
    Q6K_QL,
    Q6K_SCALES,
    Q6K_SIZE,
)
from uqff.families.gguf.cpu_search import SUB_BLOCKS, load_tile, search_scale_and_min
from uqff.families.gguf.cpu_search_scale import (
    ALMOST_HALF,
    BATCH,
    BLOCKS,
    UNSETTLED,
    bounded,
    descend_unsettled,
    load_block,
    magnitude,
    new_search,
    note_unsettled,
    or_zero,
    put_codes,
    q3_square,
    q6_square,
    rescale,
    rounded,
    scales,
    signed_ints,
    start_search,
)
from uqff.simd.arithmetic import ONE, ZERO, largest_magnitude, nearest_int, put_f16, unsigned_code
from uqff.simd.bits import f16_bits, f16_value
from uqff.simd.compiling import inline, kernel
from uqff.simd.load_store import load_f32, store_f32, store_i32, store_u8
from uqff.simd.masks import any_lane
from uqff.simd.scratch import scratch, scratch_rows
from uqff.simd.vectors import i32_to_f32, splat


@inline
def _quantize_q2k_scales(values, first, scales, shift):
    """Puts 16 scales (or mins) as multiples of 1/15 of the largest into ``scales``; gives the bits of the unit."""
    largest = ZERO
    for j in range(16):
        largest = values[first + j] if values[first + j] >= largest else largest
    if largest > ZERO:
        inverse = np.float32(15) / largest
        for j in range(16):
            scales[j] |= (nearest_int(inverse * values[first + j]) & 0xFF) << shift & 0xFF
        return f16_bits(largest / np.float32(15))
    return np.int64(0)


@inline
def _spread(value, values, at, size):
    for i in range(size):
        values[at + i] = value


@inline
def _codes_with_min(x, block, steps, offsets, top, codes):
    """Final codes of a block, given every element's ``d * scale`` and ``dmin * min``; 0 if the former is."""
    for i in range(256):
        step = steps[i]
        code = unsigned_code((x[block, i] + offsets[i]) / step, top)
        codes[i] = np.uint8(np.int32(ZERO if step == ZERO else code))


@inline
def _put_2bit_codes(codes, out, block, at):
    for half in range(2):
        c = half * 128
        for j in range(32):
            low = codes[c + j] | codes[c + 32 + j] << np.uint8(2)
            high = codes[c + 64 + j] << np.uint8(4) | codes[c + 96 + j] << np.uint8(6)
            out[block, at + half * 32 + j] = np.uint8(low | high)


@kernel
def q2k(x, out, lo, hi):
    tile = scratch_rows(16, SUB_BLOCKS, np.float32)
    tile_codes = scratch_rows(16, SUB_BLOCKS, np.float32)
    state = (
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
    )
    scale = scratch(SUB_BLOCKS, np.float32)
    minimum = scratch(SUB_BLOCKS, np.float32)
    scales = scratch(16, np.int64)
    steps = scratch(256, np.float32)
    offsets = scratch(256, np.float32)
    codes = scratch(256, np.uint8)
    for first in range(lo, hi, SUB_BLOCKS // 16):
        blocks = min(SUB_BLOCKS // 16, hi - first)
        load_tile(x, first, blocks, tile)
        search_scale_and_min(tile, tile_codes, state, np.float32(3), scale, minimum)
        for b in range(blocks):
            block = first + b
            for j in range(16):
                scales[j] = 0
            d_bits = _quantize_q2k_scales(scale, b * 16, scales, 0)
            dmin_bits = _quantize_q2k_scales(minimum, b * 16, scales, 4)
            d = f16_value(d_bits)
            dmin = f16_value(dmin_bits)
            for j in range(16):
                _spread(d * np.float32(scales[j] & 15), steps, j * 16, 16)
                _spread(dmin * np.float32(scales[j] >> 4), offsets, j * 16, 16)
                out[block, Q2K_SCALES + j] = np.uint8(scales[j])
            _codes_with_min(x, block, steps, offsets, np.float32(3), codes)
            _put_2bit_codes(codes, out, block, Q2K_QS)
            put_f16(out, block, Q2K_D, d_bits)
            put_f16(out, block, Q2K_DMIN, dmin_bits)


@inline
def _largest_scale(scale, room):
    """The first of largest magnitude, with its sign; NaN never; else 0."""
    store_f32(room, 0, or_zero(scale))
    return largest_magnitude(room, 0, 16)


@inline
def _codes_of_steps(x, start, step, steps, top, codes):
    """``round(x / step)`` saturated to -top..top - 1, plus ``top``, of a block; any code where ``step`` is 0.

    The product with the inverse will do, unless it is close to a tie: it and the quotient are up to 33 and less than
    2^-17 apart, as a step, the product of a float16 and an integer, has an inverse of full precision.
    """
    store_f32(steps[0], 0, step)
    store_f32(steps[1], 0, or_zero(splat(ONE) / step))
    for j in range(16):
        v = load_f32(x, start + 16 * j)
        near = bounded(v * splat(steps[1, j]), -top, top - ONE)
        code = rounded(near)
        if any_lane(magnitude(near - i32_to_f32(code)) > ALMOST_HALF):
            code = signed_ints(v / splat(steps[0, j]), -top, top - ONE)
        store_u8(codes, 16 * j, code + np.int32(top))


@kernel
def q3k(x, out, lo, hi):
    search = new_search(scratch(UNSETTLED, np.int32), scratch(BLOCKS, np.bool_))
    room = scratch_rows(1, 16, np.float32)
    six_bit = scratch(16, np.int32)
    steps = scratch_rows(2, 16, np.float32)
    codes = scratch(256, np.uint8)
    top = np.float32(4)
    for first in range(lo, hi, BATCH):
        blocks = min(BATCH, hi - first)
        count = np.int64(0)  # of one type throughout: for a literal, what it is given to would be compiled once more
        for b in range(blocks):
            largest = load_block(x, 256 * (first + b), search.tile, 0)
            store_f32(search.largest, 16 * b, largest)
            start_search(search.tile, 0, splat(-top) / largest, search.sums, 16 * b, top, q3_square)
            count = note_unsettled(search, 0, 16 * b, top, q3_square, count)
        descend_unsettled(x, first, search, count, top, q3_square)
        for b in range(blocks):
            block = first + b
            scale = scales(search, b)
            top_scale = _largest_scale(scale, room)
            d_bits = np.int64(0)
            multiple = splat(-32)
            if top_scale != ZERO:
                inverse = np.float32(-32) / top_scale
                d_bits = f16_bits(ONE / inverse)
                multiple = signed_ints(scale * inverse, np.float32(-32), np.float32(31))
            store_i32(six_bit, 0, multiple + 32)
            step = i32_to_f32(multiple) * f16_value(d_bits)
            _codes_of_steps(x, 256 * block, step, steps, top, codes)
            if any_lane(step == ZERO):
                for j in range(16):
                    if steps[0, j] == ZERO:
                        _spread(np.uint8(0), codes, j * 16, 16)
            _put_high_bits(codes, out, block, Q3K_HMASK, 2)
            _keep_bits(codes, 3)
            _put_2bit_codes(codes, out, block, Q3K_QS)
            for j in range(8):
                out[block, Q3K_SCALES + j] = np.uint8(six_bit[j] & 15 | (six_bit[8 + j] & 15) << 4)
            for j in range(4):
                low = six_bit[j] >> 4 | six_bit[4 + j] >> 4 << 2
                out[block, Q3K_SCALES + 8 + j] = np.uint8(low | six_bit[8 + j] >> 4 << 4 | six_bit[12 + j] >> 4 << 6)
            put_f16(out, block, Q3K_D, d_bits)


@inline
def _put_high_bits(codes, out, block, at, bit):
    """Bit ``bit`` of all codes: bit k of byte j is that of element 32 * k + j."""
    for j in range(32):
        byte = np.uint8(0)
        for k in range(8):
            byte = np.uint8(byte | np.uint8(np.uint8(codes[32 * k + j] >> np.uint8(bit)) << np.uint8(k)))
        out[block, at + j] = byte


@inline
def _keep_bits(codes, mask):
    for j in range(256):
        codes[j] &= np.uint8(mask)


@kernel
def q4k(x, out, lo, hi):
    tile = scratch_rows(32, SUB_BLOCKS, np.float32)
    tile_codes = scratch_rows(32, SUB_BLOCKS, np.float32)
    state = (
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
    )
    scale = scratch(SUB_BLOCKS, np.float32)
    minimum = scratch(SUB_BLOCKS, np.float32)
    six_bit = scratch_rows(2, 8, np.int64)
    steps = scratch(256, np.float32)
    offsets = scratch(256, np.float32)
    codes = scratch(256, np.uint8)
    for first in range(lo, hi, SUB_BLOCKS // 8):
        blocks = min(SUB_BLOCKS // 8, hi - first)
        load_tile(x, first, blocks, tile)
        search_scale_and_min(tile, tile_codes, state, np.float32(15), scale, minimum)
        for b in range(blocks):
            d, dmin = _put_k4_scales(out, first + b, scale, minimum, b * 8, six_bit)
            _spread_k4(d, dmin, six_bit, steps, offsets)
            _codes_with_min(x, first + b, steps, offsets, np.float32(15), codes)
            _put_k4_nibbles(codes, out, first + b, Q4K_QS)


@kernel
def q5k(x, out, lo, hi):
    tile = scratch_rows(32, SUB_BLOCKS, np.float32)
    tile_codes = scratch_rows(32, SUB_BLOCKS, np.float32)
    state = (
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
        scratch(SUB_BLOCKS, np.float32),
    )
    scale = scratch(SUB_BLOCKS, np.float32)
    minimum = scratch(SUB_BLOCKS, np.float32)
    six_bit = scratch_rows(2, 8, np.int64)
    steps = scratch(256, np.float32)
    offsets = scratch(256, np.float32)
    codes = scratch(256, np.uint8)
    for first in range(lo, hi, SUB_BLOCKS // 8):
        blocks = min(SUB_BLOCKS // 8, hi - first)
        load_tile(x, first, blocks, tile)
        search_scale_and_min(tile, tile_codes, state, np.float32(31), scale, minimum)
        for b in range(blocks):
            d, dmin = _put_k4_scales(out, first + b, scale, minimum, b * 8, six_bit)
            _spread_k4(d, dmin, six_bit, steps, offsets)
            _codes_with_min(x, first + b, steps, offsets, np.float32(31), codes)
            _put_high_bits(codes, out, first + b, Q5K_QH, 4)
            _keep_bits(codes, 15)
            _put_k4_nibbles(codes, out, first + b, Q5K_QS)


@inline
def _quantize_k4_scales(values, first, multiples):
    """8 scales (or mins) as multiples of 1/63 of the largest; gives the bits of the unit."""
    largest = ZERO
    for j in range(8):
        largest = values[first + j] if values[first + j] >= largest else largest
    inverse = np.float32(63) / largest if largest > ZERO else ZERO
    for j in range(8):
        multiples[j] = min(nearest_int(inverse * values[first + j]), 63) & 0xFF
    return f16_bits(largest / np.float32(63))


@inline
def _put_k4_scales(out, block, scale, minimum, first, six_bit):
    """The 16 bytes Q4K and Q5K begin with; gives d and dmin as a reader sees them."""
    ls, lm = six_bit[0], six_bit[1]
    d_bits = _quantize_k4_scales(scale, first, ls)
    dmin_bits = _quantize_k4_scales(minimum, first, lm)
    put_f16(out, block, Q4K_D, d_bits)
    put_f16(out, block, Q4K_DMIN, dmin_bits)
    for j in range(4):
        out[block, Q4K_SCALES + j] = np.uint8(ls[j] | ls[4 + j] >> 4 << 6)
        out[block, Q4K_SCALES + 4 + j] = np.uint8(lm[j] | lm[4 + j] >> 4 << 6)
        out[block, Q4K_SCALES + 8 + j] = np.uint8(ls[4 + j] & 15 | (lm[4 + j] & 15) << 4)
    return f16_value(d_bits), f16_value(dmin_bits)


@inline
def _spread_k4(d, dmin, six_bit, steps, offsets):
    for j in range(8):
        _spread(d * np.float32(six_bit[0, j]), steps, j * 32, 32)
        _spread(dmin * np.float32(six_bit[1, j]), offsets, j * 32, 32)


@inline
def _put_k4_nibbles(codes, out, block, at):
    for run in range(4):
        for j in range(32):
            out[block, at + run * 32 + j] = codes[run * 64 + j] | codes[run * 64 + 32 + j] << np.uint8(4)


@kernel
def q6k(x, out, lo, hi):
    search = new_search(scratch(UNSETTLED, np.int32), scratch(BLOCKS, np.bool_))
    room = scratch_rows(1, 16, np.float32)
    steps = scratch_rows(2, 16, np.float32)
    codes = scratch(256, np.uint8)
    top = np.float32(32)
    for first in range(lo, hi, BATCH):
        blocks = min(BATCH, hi - first)
        count = np.int64(0)  # of one type throughout: for a literal, what it is given to would be compiled once more
        for start in range(0, blocks, BLOCKS):
            for b in range(BLOCKS):
                at = min(start + b, blocks - 1)  # after the last block, the last again
                largest = load_block(x, 256 * (first + at), search.tile, b)
                store_f32(search.largest, 16 * (start + b), largest)
                start_search(search.tile, b, splat(-top) / largest, search.sums, 16 * (start + b), top, q6_square)
            rescale(search, start)
            for b in range(min(BLOCKS, blocks - start)):
                count = note_unsettled(search, b, 16 * (start + b), top, q6_square, count)
        descend_unsettled(x, first, search, count, top, q6_square)
        before = np.int64(0)
        for b in range(blocks):
            block = first + b
            scale = scales(search, b)
            inverse = np.float32(-128) / _largest_scale(scale, room)
            d_bits = f16_bits(ONE / inverse)
            # Below -128 is only minus infinity. Its int32 ends in the byte 0, and so does -256.
            multiple = signed_ints(scale * inverse, np.float32(-256), np.float32(127))
            store_u8(out, Q6K_SIZE * block + Q6K_SCALES, multiple)
            step = i32_to_f32(((multiple + 128) & 0xFF) - 128) * f16_value(d_bits)
            _codes_of_steps(x, 256 * block, step, steps, top, codes)
            if any_lane(step == ZERO):
                for j in range(16):
                    if steps[0, j] == ZERO:
                        before = put_codes(x, first, 16 * b + j, search, before, count, top, codes, 16 * j)
            for half in range(2):
                c = half * 128
                for j in range(64):
                    low = codes[c + j] & np.uint8(15) | codes[c + 64 + j] << np.uint8(4)
                    out[block, Q6K_QL + half * 64 + j] = np.uint8(low)
            for j in range(256):
                codes[j] >>= np.uint8(4)
            _put_2bit_codes(codes, out, block, Q6K_QH)
            put_f16(out, block, Q6K_D, d_bits)
