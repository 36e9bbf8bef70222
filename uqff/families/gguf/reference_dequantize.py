"""The reference dequantisers of the ggml types, in torch: one function a type, fields in file order.

Each takes uint8 ``[n, type_size]`` and gives float32 ``[n, block_size]``.  The order of float operations is ggml's
(``ggml-quants.c``, ``dequantize_row_*``), so results are bit-equal to it and to gguf-py:
``(d * scale) * q - (dmin * m)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from uqff.families.gguf import blocks as ggml

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEQUANTIZERS"]


def _float(codes: Tensor) -> Tensor:
    import torch

    return codes.to(torch.float32)


def nibbles(qs: Tensor) -> Tensor:
    """Byte j holds codes j and j + 16: uint8 ``[n, 16]`` to ``[n, 32]``."""
    import torch

    return torch.cat((qs & 0x0F, qs >> 4), dim=1)


def bit_planes(qs: Tensor, bits: int, run: int) -> Tensor:
    """Bytes in runs of ``run``; each run holds ``8 / bits`` stretches of ``run`` codes, lowest bits first."""
    import torch

    runs = qs.reshape(qs.shape[0], -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=qs.device).reshape(1, 1, -1, 1)
    return ((runs >> shifts) & (1 << bits) - 1).reshape(qs.shape[0], -1)


def fifth_bits(qh: Tensor) -> Tensor:
    """Bit j of a u32 belongs to element j: int32 ``[n, 1]`` to uint8 ``[n, 32]`` with 0 or 16."""
    import torch

    shifts = torch.arange(32, dtype=torch.int32, device=qh.device)
    return (((qh >> shifts) & 1) << 4).to(torch.uint8)


def _spread(per_group: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as ``[n, groups, size]`` beside their group's number as ``[n, groups, 1]``."""
    return per_group.unsqueeze(-1), codes.reshape(*per_group.shape, -1)


def _dequantize_q4_0(blocks: Tensor) -> Tensor:
    d, qs = ggml.Q4_0.unpack(blocks)
    return d * (_float(nibbles(qs)) - 8)


def _dequantize_q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = ggml.Q4_1.unpack(blocks)
    return d * _float(nibbles(qs)) + m


def _dequantize_q5_0(blocks: Tensor) -> Tensor:
    d, qh, qs = ggml.Q5_0.unpack(blocks)
    return d * (_float(nibbles(qs) | fifth_bits(qh)) - 16)


def _dequantize_q5_1(blocks: Tensor) -> Tensor:
    d, m, qh, qs = ggml.Q5_1.unpack(blocks)
    return d * _float(nibbles(qs) | fifth_bits(qh)) + m


def _dequantize_q8_0(blocks: Tensor) -> Tensor:
    d, qs = ggml.Q8_0.unpack(blocks)
    return d * _float(qs)


def _dequantize_q8_1(blocks: Tensor) -> Tensor:
    d, _, qs = ggml.Q8_1.unpack(blocks)
    return d * _float(qs)


def _dequantize_q2k(blocks: Tensor) -> Tensor:
    scales, qs, d, dmin = ggml.Q2K.unpack(blocks)
    scale, codes = _spread(d * _float(scales & 0x0F), _float(bit_planes(qs, 2, 32)))
    minimum = (dmin * _float(scales >> 4)).unsqueeze(-1)
    return (scale * codes - minimum).reshape(len(blocks), -1)


def scales_q3k(packed: Tensor) -> Tensor:
    """The 16 six-bit scales of Q3K, minus 32.

    ::

        byte i      (0..7):   H H H H L L L L     L: scale i, low four bits      H: scale i + 8, low four bits
        byte 8 + i  (0..3):   d d c c b b a a     high two bits of scales i (a), i + 4 (b), i + 8 (c), i + 12 (d)
    """
    import torch

    low, high = packed[:, :8], packed[:, 8:]
    low = torch.cat((low & 0x0F, low >> 4), dim=1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return (low | high << 4).to(torch.int8) - 32


def _dequantize_q3k(blocks: Tensor) -> Tensor:
    import torch

    hmask, qs, scales, d = ggml.Q3K.unpack(blocks)
    codes = (bit_planes(qs, 2, 32) | bit_planes(hmask, 1, 32) << 2).to(torch.int8) - 4
    scale, codes = _spread(d * _float(scales_q3k(scales)), _float(codes))
    return (scale * codes).reshape(len(blocks), -1)


def scales_q4k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 six-bit scales and 8 six-bit minimums of Q4K and Q5K.

    ::

        byte i      (0..3):   S S s s s s s s     s: scale i                 S: high two bits of scale i + 4
        byte 4 + i  (0..3):   M M m m m m m m     m: minimum i               M: high two bits of minimum i + 4
        byte 8 + i  (0..3):   m m m m s s s s     s: scale i + 4, low bits   m: minimum i + 4, low bits
    """
    import torch

    s, m, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((s & 0x3F, (both & 0x0F) | (s >> 6 << 4)), dim=1)
    minimum = torch.cat((m & 0x3F, (both >> 4) | (m >> 6 << 4)), dim=1)
    return scale, minimum


def _affine(d: Tensor, dmin: Tensor, packed: Tensor, codes: Tensor) -> Tensor:
    scales, minimums = scales_q4k(packed)
    scale, grouped = _spread(d * _float(scales), _float(codes))
    return (scale * grouped - (dmin * _float(minimums)).unsqueeze(-1)).reshape(len(d), -1)


def _dequantize_q4k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qs = ggml.Q4K.unpack(blocks)
    return _affine(d, dmin, scales, bit_planes(qs, 4, 32))


def _dequantize_q5k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qh, qs = ggml.Q5K.unpack(blocks)
    return _affine(d, dmin, scales, bit_planes(qs, 4, 32) | bit_planes(qh, 1, 32) << 4)


def _dequantize_q6k(blocks: Tensor) -> Tensor:
    import torch

    ql, qh, scales, d = ggml.Q6K.unpack(blocks)
    codes = (bit_planes(ql, 4, 64) | bit_planes(qh, 2, 32) << 4).to(torch.int8) - 32
    scale, grouped = _spread(d * _float(scales), _float(codes))
    return (scale * grouped).reshape(len(blocks), -1)


def _dequantize_q8k(blocks: Tensor) -> Tensor:
    d, qs, _ = ggml.Q8K.unpack(blocks)
    return d * _float(qs)


def _widen(block_type: ggml.BlockType) -> Callable[[Tensor], Tensor]:
    def dequantize(blocks: Tensor) -> Tensor:
        (x,) = block_type.unpack(blocks)
        return x

    return dequantize


DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _widen(ggml.F32),
    "F16": _widen(ggml.F16),
    "BF16": _widen(ggml.BF16),
    "Q4_0": _dequantize_q4_0,
    "Q4_1": _dequantize_q4_1,
    "Q5_0": _dequantize_q5_0,
    "Q5_1": _dequantize_q5_1,
    "Q8_0": _dequantize_q8_0,
    "Q8_1": _dequantize_q8_1,
    "Q2K": _dequantize_q2k,
    "Q3K": _dequantize_q3k,
    "Q4K": _dequantize_q4k,
    "Q5K": _dequantize_q5k,
    "Q6K": _dequantize_q6k,
    "Q8K": _dequantize_q8k,
}
