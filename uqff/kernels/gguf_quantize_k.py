"""Quantisers of Q2K, Q3K, Q4K, Q5K and Q6K: the fast twins of those in ``uqff.families.gguf.quantize``."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.kernels.arithmetic import ONE, ZERO, nearest_int, put_f16, signed_code, unsigned_code
from uqff.kernels.bits import f16_bits, f16_value
from uqff.kernels.compiling import inline, kernel
from uqff.kernels.gguf_search import (
    LANES,
    descend,
    largest_of_lanes,
    load_tile,
    q3_square,
    q6_square,
    rescale,
    search_rows,
    search_scale_and_min,
    start_search,
    weigh,
)


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
def _put_crumbs(codes, out, block, at):
    for half in range(2):
        c = half * 128
        for j in range(32):
            low = codes[c + j] | codes[c + 32 + j] << np.uint8(2)
            high = codes[c + 64 + j] << np.uint8(4) | codes[c + 96 + j] << np.uint8(6)
            out[block, at + half * 32 + j] = np.uint8(low | high)


@kernel
def q2k(x, out, lo, hi):
    tile = np.empty((16, LANES), np.float32)
    tile_codes = np.empty((16, LANES), np.float32)
    state = search_rows()
    scale = np.empty(LANES, np.float32)
    minimum = np.empty(LANES, np.float32)
    scales = np.empty(16, np.int64)
    steps = np.empty(256, np.float32)
    offsets = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(lo, hi, LANES // 16):
        blocks = min(LANES // 16, hi - first)
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
                out[block, j] = np.uint8(scales[j])
            _codes_with_min(x, block, steps, offsets, np.float32(3), codes)
            _put_crumbs(codes, out, block, 16)
            put_f16(out, block, 80, d_bits)
            put_f16(out, block, 82, dmin_bits)


@kernel
def q3k(x, out, lo, hi):
    weighted = np.empty((3, 16, LANES), np.float32)
    tile = weighted[0]
    tile_codes = np.empty((16, LANES), np.float32)
    inverse = np.empty(LANES, np.float32)
    sumlx = np.empty(LANES, np.float32)
    suml2 = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    six_bit = np.empty(16, np.int64)
    steps = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(lo, hi, LANES // 16):
        blocks = min(LANES // 16, hi - first)
        load_tile(x, first, blocks, tile)
        largest_of_lanes(tile, scale)
        for lane in range(LANES):
            inverse[lane] = np.float32(-4) / scale[lane]
        weigh(weighted)
        start_search(weighted, tile_codes, inverse, sumlx, suml2, np.float32(4), q3_square)
        descend(weighted, tile_codes, sumlx, suml2, np.float32(4), q3_square)
        for lane in range(LANES):
            scale[lane] = ZERO if scale[lane] == ZERO else sumlx[lane] / suml2[lane]
        for b in range(blocks):
            block = first + b
            d_bits = _quantize_q3k_scales(scale, b * 16, six_bit)
            d = f16_value(d_bits)
            for j in range(16):
                _spread(d * np.float32(six_bit[j] - 32), steps, j * 16, 16)
            for i in range(256):
                step = steps[i]
                code = signed_code(x[block, i] / step, np.float32(-4), np.float32(3)) + np.float32(4)
                codes[i] = np.uint8(np.int32(ZERO if step == ZERO else code))
            _put_high_bits(codes, out, block, 0, 2)
            _keep_bits(codes, 3)
            _put_crumbs(codes, out, block, 32)
            for j in range(8):
                out[block, 96 + j] = np.uint8(six_bit[j] & 15 | (six_bit[8 + j] & 15) << 4)
            for j in range(4):
                low = six_bit[j] >> 4 | six_bit[4 + j] >> 4 << 2
                out[block, 104 + j] = np.uint8(low | six_bit[8 + j] >> 4 << 4 | six_bit[12 + j] >> 4 << 6)
            put_f16(out, block, 108, d_bits)


@inline
def _largest_scale(scale, first):
    largest = ZERO
    for j in range(16):
        largest = scale[first + j] if abs(scale[first + j]) > abs(largest) else largest
    return largest


@inline
def _quantize_q3k_scales(scale, first, six_bit):
    largest = _largest_scale(scale, first)
    if largest == ZERO:
        for j in range(16):
            six_bit[j] = 0
        return np.int64(0)
    inverse = np.float32(-32) / largest
    for j in range(16):
        six_bit[j] = min(max(nearest_int(inverse * scale[first + j]), -32), 31) + 32
    return f16_bits(ONE / inverse)


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
    tile = np.empty((32, LANES), np.float32)
    tile_codes = np.empty((32, LANES), np.float32)
    state = search_rows()
    scale = np.empty(LANES, np.float32)
    minimum = np.empty(LANES, np.float32)
    six_bit = np.empty((2, 8), np.int64)
    steps = np.empty(256, np.float32)
    offsets = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(lo, hi, LANES // 8):
        blocks = min(LANES // 8, hi - first)
        load_tile(x, first, blocks, tile)
        search_scale_and_min(tile, tile_codes, state, np.float32(15), scale, minimum)
        for b in range(blocks):
            d, dmin = _put_k4_scales(out, first + b, scale, minimum, b * 8, six_bit)
            _spread_k4(d, dmin, six_bit, steps, offsets)
            _codes_with_min(x, first + b, steps, offsets, np.float32(15), codes)
            _put_k4_nibbles(codes, out, first + b, 16)


@kernel
def q5k(x, out, lo, hi):
    tile = np.empty((32, LANES), np.float32)
    tile_codes = np.empty((32, LANES), np.float32)
    state = search_rows()
    scale = np.empty(LANES, np.float32)
    minimum = np.empty(LANES, np.float32)
    six_bit = np.empty((2, 8), np.int64)
    steps = np.empty(256, np.float32)
    offsets = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(lo, hi, LANES // 8):
        blocks = min(LANES // 8, hi - first)
        load_tile(x, first, blocks, tile)
        search_scale_and_min(tile, tile_codes, state, np.float32(31), scale, minimum)
        for b in range(blocks):
            d, dmin = _put_k4_scales(out, first + b, scale, minimum, b * 8, six_bit)
            _spread_k4(d, dmin, six_bit, steps, offsets)
            _codes_with_min(x, first + b, steps, offsets, np.float32(31), codes)
            _put_high_bits(codes, out, first + b, 16, 4)
            _keep_bits(codes, 15)
            _put_k4_nibbles(codes, out, first + b, 48)


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
    put_f16(out, block, 0, d_bits)
    put_f16(out, block, 2, dmin_bits)
    for j in range(4):
        out[block, 4 + j] = np.uint8(ls[j] | ls[4 + j] >> 4 << 6)
        out[block, 8 + j] = np.uint8(lm[j] | lm[4 + j] >> 4 << 6)
        out[block, 12 + j] = np.uint8(ls[4 + j] & 15 | (lm[4 + j] & 15) << 4)
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
    weighted = np.empty((3, 16, LANES), np.float32)
    tile = weighted[0]
    tile_codes = np.empty((16, LANES), np.float32)
    tried_codes = np.empty((16, LANES), np.float32)
    inverse = np.empty(LANES, np.float32)
    sumlx = np.empty(LANES, np.float32)
    suml2 = np.empty(LANES, np.float32)
    slx = np.empty(LANES, np.float32)
    sl2 = np.empty(LANES, np.float32)
    changed = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    steps = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    top = np.float32(32)
    for first in range(lo, hi, LANES // 16):
        blocks = min(LANES // 16, hi - first)
        load_tile(x, first, blocks, tile)
        largest_of_lanes(tile, scale)
        for lane in range(LANES):
            inverse[lane] = np.float32(-32) / scale[lane]
        weigh(weighted)
        start_search(weighted, tile_codes, inverse, sumlx, suml2, top, q6_square)
        rescale(weighted, tile_codes, tried_codes, inverse, (sumlx, suml2, slx, sl2, changed))
        descend(weighted, tile_codes, sumlx, suml2, top, q6_square)
        for lane in range(LANES):
            zero = scale[lane] == ZERO
            scale[lane] = ZERO if zero else sumlx[lane] / suml2[lane]
            if zero:
                for i in range(16):
                    tile_codes[i, lane] = -top
        for b in range(blocks):
            block = first + b
            iscale = np.float32(-128) / _largest_scale(scale, b * 16)
            d_bits = f16_bits(ONE / iscale)
            d = f16_value(d_bits)
            for j in range(16):
                byte = min(nearest_int(iscale * scale[b * 16 + j]), 127) & 0xFF
                out[block, 192 + j] = np.uint8(byte)
                _spread(d * np.float32(byte - (byte >> 7 << 8)), steps, j * 16, 16)
            for i in range(256):
                code = signed_code(x[block, i] / steps[i], np.float32(-32), np.float32(31))
                codes[i] = np.uint8(np.int32(code) + np.int32(32))
            for j in range(16):
                if steps[j * 16] == ZERO:
                    for i in range(16):
                        codes[j * 16 + i] = np.uint8(np.int32(tile_codes[i, b * 16 + j]) + np.int32(32))
            for half in range(2):
                c = half * 128
                for j in range(64):
                    low = codes[c + j] & np.uint8(15) | codes[c + 64 + j] << np.uint8(4)
                    out[block, half * 64 + j] = np.uint8(low)
            for j in range(256):
                codes[j] >>= np.uint8(4)
            _put_crumbs(codes, out, block, 128)
            put_f16(out, block, 208, d_bits)
