"""The block layouts of the ggml types, bottom-up: each declared once, sizes and numpy views derived.

A block stores 32 (legacy types) or 256 (K types, "super-blocks") consecutive weights.  F32, F16 and BF16 are blocks of
one.  Authority: ggml, ``ggml-common.h`` (``block_q4_0`` ... ``block_q8_K``); candle,
``candle-core/src/quantized/k_quants.rs``.
The stored codes are those of ggml's ``enum ggml_type``; gaps are types that UQFF does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from uqff.schema.bricks import Scalar, Vector
from uqff.schema.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_TYPES", "BlockType", "block_type_of_code", "block_type_of_kind"]

QK = 32
"""Weights in a block of a legacy type."""
QK_K = 256
"""Weights in a super-block of a K type."""


@dataclass(frozen=True)
class BlockType:
    """One ggml type.

    Attributes:
        name: as the format spells it.
        code: as stored, ggml's own number.
        block_size: weights per block.
        layout: the fields of a block.
    """

    name: str
    code: int
    block_size: int
    layout: Layout

    def __reduce__(self) -> tuple[object, ...]:
        return (block_type_of_code, (self.code,))

    @property
    def kind(self) -> str:
        """The ISQ name: the type's name in lower case."""
        return self.name.lower()

    @cached_property
    def type_size(self) -> int:
        """Bytes per block."""
        return self.layout.fixed_size

    @cached_property
    def numpy(self) -> np.dtype[np.void]:
        """A structured dtype over one block, with the fields of :attr:`layout`."""
        return np.dtype([(name, *brick.numpy) for name, brick, _ in self.layout.members])

    def unpack(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The fields of blocks, in file order.

        Args:
            blocks: uint8 ``[n, type_size]``.

        Returns:
            One tensor per field, ``[n, count]``: floats widened to float32, integers in their own dtype.
        """
        import torch

        parts, start = [], 0
        for _, brick, _ in self.layout.members:
            code, _ = brick.numpy
            size = brick.code.size
            # A copy: contiguous() leaves a single block the strides it was cut with, which no view of numbers may have.
            raw = blocks[:, start : start + size].clone(memory_format=torch.contiguous_format)
            if code != "u1":
                raw = raw.view(getattr(torch, _TORCH[code]))
            parts.append(raw.to(torch.float32) if raw.is_floating_point() else raw)
            start += size
        return parts


_TORCH = {
    "i1": "int8",
    "<i2": "int16",
    "<u4": "int32",
    "<f2": "float16",
    "<f4": "float32",
    "<u2": "bfloat16",
}
"""torch dtype of each field; the only u16 field is BF16's."""

_D = "d" / Scalar("e", "f16")

Q4_0 = BlockType(
    "Q4_0",
    2,
    QK,
    Layout(
        _D * "scale",
        "qs" / Vector(16, "B", "u8") * "codes + 8: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
Q4_1 = BlockType(
    "Q4_1",
    3,
    QK,
    Layout(
        _D * "scale",
        "m" / Scalar("e", "f16") * "minimum: the value of code 0",
        "qs" / Vector(16, "B", "u8") * "codes: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
Q5_0 = BlockType(
    "Q5_0",
    6,
    QK,
    Layout(
        _D * "scale",
        "qh" / Scalar("I", "u32") * "fifth bits of codes + 16: bit j belongs to element j",
        "qs" / Vector(16, "B", "u8") * "low four bits: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
Q5_1 = BlockType(
    "Q5_1",
    7,
    QK,
    Layout(
        _D * "scale",
        "m" / Scalar("e", "f16") * "minimum: the value of code 0",
        "qh" / Scalar("I", "u32") * "fifth bits of the codes: bit j belongs to element j",
        "qs" / Vector(16, "B", "u8") * "low four bits: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
Q8_0 = BlockType("Q8_0", 8, QK, Layout(_D * "scale", "qs" / Vector(32, "b", "i8") * "codes, in element order"))
Q8_1 = BlockType(
    "Q8_1",
    9,
    QK,
    Layout(
        _D * "scale",
        "s" / Scalar("e", "f16") * "d times the sum of the codes; for dot products, not used to dequantise",
        "qs" / Vector(32, "b", "i8") * "codes, in element order",
    ),
)
Q2K = BlockType(
    "Q2K",
    10,
    QK_K,
    Layout(
        "scales" / Vector(16, "B", "u8") * "per 16 weights: 4-bit scale (low nibble) and 4-bit minimum (high nibble)",
        "qs"
        / Vector(64, "B", "u8")
        * "2-bit codes: byte 32h + l holds elements 128h + l, + 32, + 64, + 96, lowest bits first",
        "d" / Scalar("e", "f16") * "scale of the scales",
        "dmin" / Scalar("e", "f16") * "scale of the minimums",
    ),
)
Q3K = BlockType(
    "Q3K",
    11,
    QK_K,
    Layout(
        "hmask" / Vector(32, "B", "u8") * "third bits: bit b of byte l belongs to element 32b + l; 0 means code - 4",
        "qs" / Vector(64, "B", "u8") * "low two bits, arranged as in Q2K",
        "scales" / Vector(12, "B", "u8") * "16 scales of 6 bits, + 32 (see the packing drawing)",
        "d" / Scalar("e", "f16") * "scale of the scales",
    ),
)
Q4K = BlockType(
    "Q4K",
    12,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "dmin" / Scalar("e", "f16") * "scale of the minimums",
        "scales" / Vector(12, "B", "u8") * "8 scales and 8 minimums of 6 bits (see the packing drawing)",
        "qs"
        / Vector(128, "B", "u8")
        * "4-bit codes: byte 32c + l holds elements 64c + l (low nibble) and 64c + 32 + l (high nibble)",
    ),
)
Q5K = BlockType(
    "Q5K",
    13,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "dmin" / Scalar("e", "f16") * "scale of the minimums",
        "scales" / Vector(12, "B", "u8") * "8 scales and 8 minimums of 6 bits, as in Q4K",
        "qh" / Vector(32, "B", "u8") * "fifth bits: bit b of byte l belongs to element 32b + l",
        "qs" / Vector(128, "B", "u8") * "low four bits, arranged as in Q4K",
    ),
)
Q6K = BlockType(
    "Q6K",
    14,
    QK_K,
    Layout(
        "ql" / Vector(128, "B", "u8") * "low four bits: byte 64h + l holds elements 128h + l and 128h + 64 + l",
        "qh" / Vector(64, "B", "u8") * "high two bits of codes + 32, arranged as the codes of Q2K",
        "scales" / Vector(16, "b", "i8") * "scale per 16 weights",
        "d" / Scalar("e", "f16") * "scale of the scales",
    ),
)
Q8K = BlockType(
    "Q8K",
    15,
    QK_K,
    Layout(
        "d" / Scalar("f", "f32") * "scale",
        "qs" / Vector(256, "b", "i8") * "codes, in element order",
        "bsums" / Vector(16, "h", "i16") * "sums of 16 codes; for dot products, not used to dequantise",
    ),
)
F32 = BlockType("F32", 0, 1, Layout("x" / Scalar("f", "f32") * "the weight"))
F16 = BlockType("F16", 1, 1, Layout("x" / Scalar("e", "f16") * "the weight"))
BF16 = BlockType("BF16", 30, 1, Layout("x" / Scalar("H", "bf16") * "the weight"))

BLOCK_TYPES = (F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2K, Q3K, Q4K, Q5K, Q6K, Q8K, BF16)
"""Every type a GGUF blob can hold, by code."""

_BY_CODE = {t.code: t for t in BLOCK_TYPES}
_BY_KIND = {t.kind: t for t in BLOCK_TYPES}


def block_type_of_code(code: int) -> BlockType | None:
    """The type of a stored code, None if UQFF has none."""
    return _BY_CODE.get(code)


def block_type_of_kind(kind: str) -> BlockType | None:
    """The type of an ISQ name, None if it is not a ggml type."""
    return _BY_KIND.get(kind)
