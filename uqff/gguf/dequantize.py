"""The dequantisers of the ggml types that UQFF has no code for, in numpy: one function a type, fields in file order.

Each takes blocks as a structured array ``[n]`` of the type's fields and gives float32 ``[n, ...]``, whose numbers are
those of the blocks in order.  The order of float operations is gguf-py's, so results are bit-equal to it.  UQFF's own
types are dequantised by :mod:`uqff.families.gguf`.

Authority: gguf-py, ``quants.py`` (``dequantize_blocks``); ggml, ``ggml-quants.c`` (``dequantize_row_*``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf.blocks import BlockType
from uqff.gguf import grids
from uqff.gguf.grids import Grid

__all__ = ["DEQUANTIZERS", "dequantized"]

Blocks: TypeAlias = npt.NDArray[np.void]
Codes: TypeAlias = Any
"""An array of unsigned integers. numpy has no types for fields of structured arrays, and what is computed of them."""
Numbers: TypeAlias = Any
"""An array of float32."""

TILE: Final = 1 << 18
"""Weights that are dequantised together: what a dequantiser holds besides its result is some 16 times as many bytes."""

SIGNS: Final = np.array([code | (code.bit_count() & 1) << 7 for code in range(128)], np.uint8)
"""Eight signs of a code of seven bits: the last makes the number of minuses even."""

IQ4_LEVELS: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
"""What the codes of IQ4_NL and IQ4_XS stand for (``kvalues_iq4nl``)."""

E2M1_DOUBLED: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)
"""Twice the 4-bit floats (``kvalues_mxfp4``); ggml has no negative zero."""

ONE_EIGHTH: Final = np.float32(0.125)


def _bits(codes: Codes, bits: int, count: int, step: int | None = None) -> Codes:
    """``count`` numbers of ``bits`` bits out of each code, lowest first, along a new last dimension.

    Args:
        codes: unsigned integers.
        bits: of a number.
        count: how many.
        step: from one to the next, if not ``bits``.
    """
    shifts = np.arange(count, dtype=codes.dtype) * codes.dtype.type(bits if step is None else step)
    return codes[..., None] >> shifts & codes.dtype.type((1 << bits) - 1)


def _flat(codes: Codes) -> Codes:
    """All but the first dimension as one."""
    return codes.reshape(len(codes), -1)


def _d(blocks: Blocks, dims: int = 0) -> Numbers:
    """The scale of each block, with so many dimensions behind it."""
    return blocks["d"].astype(np.float32).reshape(-1, *(1,) * dims)


def _signs(bits: Codes) -> Numbers:
    """1 or -1 for each of 8 bits, along a new last dimension."""
    return np.where(_bits(bits, 1, 8) == 0, np.float32(1), np.float32(-1))


def _codewords(grid: Grid, index: Codes) -> Numbers:
    return grid.values[index]


def _iq2(blocks: Blocks, grid: Grid, index: Codes, signs: Codes, scales: Codes) -> Numbers:
    """``d (0.5 + scale) 0.25`` for each of ``scales [n, s]``, over codewords of eight with eight signs each."""
    db = _d(blocks)[:, None] * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(0.25)
    shape = (*scales.shape, -1, 8)
    return db[:, :, None, None] * _codewords(grid, index).reshape(shape) * _signs(signs).reshape(shape)


def _iq2_xxs(blocks: Blocks) -> Numbers:
    pairs = blocks["qs"].reshape(-1, 8, 2)
    index, rest = _bits(pairs[..., 0], 8, 4), pairs[..., 1]
    return _iq2(blocks, grids.IQ2_XXS, index, SIGNS[_bits(rest, 7, 4)], rest >> np.uint32(28))


def _iq2_xs(blocks: Blocks) -> Numbers:
    qs = blocks["qs"]
    index, signs = qs & np.uint16(511), SIGNS[qs >> np.uint16(9)]
    return _iq2(blocks, grids.IQ2_XS, index, signs, _flat(_bits(blocks["scales"], 4, 2)))


def _iq2_s(blocks: Blocks) -> Numbers:
    high = _flat(_bits(blocks["qh"], 2, 4)).astype(np.uint16)
    index = blocks["qs"] | high << np.uint16(8)
    return _iq2(blocks, grids.IQ2_S, index, blocks["signs"], _flat(_bits(blocks["scales"], 4, 2)))


def _iq3_xxs(blocks: Blocks) -> Numbers:
    rest = blocks["scales"]
    scales = (rest >> np.uint32(28)).astype(np.float32)
    db = _d(blocks)[:, None] * (np.float32(0.5) + scales) * np.float32(0.5)
    grid = _codewords(grids.IQ3_XXS, blocks["qs"]).reshape(-1, 8, 4, 8)
    return db[:, :, None, None] * grid * _signs(SIGNS[_bits(rest, 7, 4)])


def _iq3_s(blocks: Blocks) -> Numbers:
    high = _flat(_bits(blocks["qh"], 1, 8)).astype(np.uint16)
    grid = _codewords(grids.IQ3_S, blocks["qs"] | high << np.uint16(8)).reshape(-1, 8, 4, 8)
    scales = _flat(_bits(blocks["scales"], 4, 2)).astype(np.float32)
    db = _d(blocks)[:, None] * (1 + 2 * scales)
    return db[:, :, None, None] * grid * _signs(blocks["signs"].reshape(-1, 8, 4))


def _iq1_s(blocks: Blocks) -> Numbers:
    qh = blocks["qh"]
    high = _flat(_bits(qh, 3, 4))
    grid = _codewords(grids.IQ1_S, blocks["qs"] | high << np.uint16(8)).reshape(-1, 8, 4, 8)
    scales = (qh >> np.uint16(12) & np.uint16(7)).astype(np.float32)
    dl = _d(blocks)[:, None] * (2 * scales + 1)
    delta = np.where(qh >> np.uint16(15) == 0, ONE_EIGHTH, -ONE_EIGHTH)
    return dl[:, :, None, None] * (grid + delta[:, :, None, None])


def _scale_iq1_m(scales: Codes) -> Numbers:
    """The f16 scale of a block, out of the high four bits of four words.

    ::

        word 0   d d d d s s s s s s s s s s s s      d: bits 0 to 3 of the f16
        word 1   d d d d ...                             bits 4 to 7, and so on
    """
    high = (scales >> np.uint16(12)) << np.array([0, 4, 8, 12], np.uint16)
    words = np.bitwise_or.reduce(high, axis=1)
    return words.view(np.float16).astype(np.float32)


def _iq1_m(blocks: Blocks) -> Numbers:
    nibbles = _flat(_bits(blocks["qh"], 4, 2))
    high = (nibbles & np.uint8(7)).astype(np.uint16)
    grid = _codewords(grids.IQ1_S, blocks["qs"] | high << np.uint16(8)).reshape(-1, 16, 2, 8)
    scales = _flat(_bits(blocks["scales"], 3, 4)).astype(np.float32)
    dl = _scale_iq1_m(blocks["scales"])[:, None] * (2 * scales + 1)
    delta = np.where(nibbles & np.uint8(8) == 0, ONE_EIGHTH, -ONE_EIGHTH).reshape(-1, 16, 2, 1)
    return dl[:, :, None, None] * (grid + delta)


def _halves(qs: Codes, run: int) -> Codes:
    """Runs of bytes whose low nibbles come first, then the high ones: ``[n, groups, 2 * run]``."""
    runs = qs.reshape(len(qs), -1, run)
    return np.concatenate((runs & np.uint8(15), runs >> np.uint8(4)), axis=-1)


def _iq4_nl(blocks: Blocks) -> Numbers:
    return _d(blocks, 2) * IQ4_LEVELS[_halves(blocks["qs"], 16)]


def _iq4_xs(blocks: Blocks) -> Numbers:
    low = _flat(_bits(blocks["scales_l"], 4, 2))
    high = _bits(blocks["scales_h"], 2, 8).astype(np.uint8)
    scales = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    dl = _d(blocks)[:, None] * scales
    return dl[:, :, None] * IQ4_LEVELS[_halves(blocks["qs"], 16)]


def _trits(codes: Codes, count: int) -> Codes:
    """``count`` digits of base 3 out of bytes ``[n, run]``, as ``[n, count * run]`` of -1, 0, 1.

    A byte is the number 0.ttttt of base 3, times 256 and rounded up: the digits come out at the top of multiples.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count]
    top = codes[:, None, :] * powers[:, None]  # modulo 256: what has come out is gone
    return _flat((top.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).astype(np.int8) - np.int8(1))


def _tq1_0(blocks: Blocks) -> Numbers:
    qs = blocks["qs"]
    codes = (_trits(qs[:, :32], 5), _trits(qs[:, 32:], 5), _trits(blocks["qh"], 4))
    return _d(blocks, 1) * np.concatenate(codes, axis=1).astype(np.float32)


def _tq2_0(blocks: Blocks) -> Numbers:
    codes = _bits(blocks["qs"].reshape(-1, 2, 32), 2, 4).swapaxes(2, 3)
    return _d(blocks, 1) * (_flat(codes).astype(np.float32) - np.float32(1))


def _half_e8m0(exponents: Codes) -> Numbers:
    """``2 ** (e - 128)``: half of what the exponents say, for the doubled floats; the two smallest are subnormal."""
    e = exponents.astype(np.uint32)
    return np.where(e < 2, np.uint32(1 << 21) << np.minimum(e, 1), (e - np.uint32(1)) << np.uint32(23)).view(np.float32)


def _mxfp4(blocks: Blocks) -> Numbers:
    return _half_e8m0(blocks["e"])[:, None, None] * E2M1_DOUBLED[_halves(blocks["qs"], 16)]


def _half_e4m3(codes: Codes) -> Numbers:
    """Half of what E4M3 says without its sign; its NaN is 0."""
    exponent = (codes >> np.uint8(3) & np.uint8(15)).astype(np.int32)
    mantissa = (codes & np.uint8(7)).astype(np.int32)
    subnormal, normal = (
        np.ldexp(mantissa.astype(np.float32), -10),
        np.ldexp((mantissa + 8).astype(np.float32), exponent - 11),
    )
    return np.where(codes == 0x7F, np.float32(0), np.where(exponent == 0, subnormal, normal))


def _nvfp4(blocks: Blocks) -> Numbers:
    return _half_e4m3(blocks["d"])[:, :, None] * E2M1_DOUBLED[_halves(blocks["qs"], 8)]


def _plain(blocks: Blocks) -> Numbers:
    """Numbers: to the nearest float32."""
    with np.errstate(over="ignore"):  # of float64: infinite, as a cast of one is
        return blocks["x"].astype(np.float32)


DEQUANTIZERS: Final[dict[str, Callable[[Blocks], Numbers]]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ3_XXS": _iq3_xxs,
    "IQ1_S": _iq1_s,
    "IQ4_NL": _iq4_nl,
    "IQ3_S": _iq3_s,
    "IQ2_S": _iq2_s,
    "IQ4_XS": _iq4_xs,
    "I8": _plain,
    "I16": _plain,
    "I32": _plain,
    "I64": _plain,
    "F64": _plain,
    "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}


def dequantized(block_type: BlockType, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The numbers of blocks.

    Args:
        block_type: one of :data:`uqff.gguf.types.FOREIGN_TYPES`.
        data: their bytes, contiguous; a whole number of blocks.

    Returns:
        float32 ``[n * block_size]``, new memory.
    """
    blocks = data.reshape(-1).view(block_type.numpy)
    made = np.empty(len(blocks) * block_type.block_size, np.float32)
    step = max(1, TILE // block_type.block_size)
    dequantize = DEQUANTIZERS[block_type.name]
    with np.errstate(invalid="ignore", over="ignore"):  # of scales that are infinite or not a number
        for at in range(0, len(blocks), step):
            tile = dequantize(blocks[at : at + step]).reshape(-1)
            made[at * block_type.block_size :][: len(tile)] = tile
    return made
