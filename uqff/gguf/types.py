"""The ggml types that UQFF has no code for: layouts of their blocks, declared as those of the family GGUF are.

A block stores 32, 64 or 256 consecutive weights; the plain types are blocks of one.  Codes are those of ggml's
``enum ggml_type``.

Authority: ggml, ``ggml-common.h`` (``block_iq2_xxs`` ... ``block_nvfp4``), ``ggml.c`` (``type_traits``); gguf-py,
``constants.py`` (``GGML_QUANT_SIZES``).
"""

from __future__ import annotations

from typing import Final

from uqff.families.gguf.blocks import QK, QK_K, BlockType, block_type_of_code
from uqff.schema.bricks import Scalar, Vector
from uqff.schema.layout import Layout

__all__ = ["FOREIGN_TYPES", "UNREAD_TYPES", "ForeignType", "ggml_type", "type_name"]


class ForeignType(BlockType):
    """A ggml type that UQFF has no code for."""

    def __reduce__(self) -> tuple[object, ...]:
        return (ggml_type, (self.code,))


IQ2_XXS = ForeignType(
    "IQ2_XXS",
    16,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs"
        / Vector(16, "I", "u32")
        * "pairs, one per 32 weights: 4 indices of 8 bits; then 4 signs of 7 bits and a scale of 4 bits",
    ),
)
IQ2_XS = ForeignType(
    "IQ2_XS",
    17,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs" / Vector(32, "H", "u16") * "per 8 weights: index of 9 bits, signs of 7 bits",
        "scales" / Vector(8, "B", "u8") * "per 16 weights, low nibble first: scale",
    ),
)
IQ3_XXS = ForeignType(
    "IQ3_XXS",
    18,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs" / Vector(64, "B", "u8") * "per 4 weights: index",
        "scales" / Vector(8, "I", "u32") * "per 32 weights: 4 signs of 7 bits and a scale of 4 bits",
    ),
)
IQ1_S = ForeignType(
    "IQ1_S",
    19,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs" / Vector(32, "B", "u8") * "per 8 weights: low 8 bits of the index",
        "qh"
        / Vector(8, "H", "u16")
        * "per 32 weights: high 3 bits of 4 indices, a scale of 3 bits, whether 1/8 is subtracted or added",
    ),
)
IQ4_NL = ForeignType(
    "IQ4_NL",
    20,
    QK,
    Layout(
        "d" / Scalar("e", "f16") * "scale",
        "qs" / Vector(16, "B", "u8") * "codes: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
IQ3_S = ForeignType(
    "IQ3_S",
    21,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs" / Vector(64, "B", "u8") * "per 4 weights: low 8 bits of the index",
        "qh" / Vector(8, "B", "u8") * "per 32 weights: ninth bits of 8 indices",
        "signs" / Vector(32, "B", "u8") * "sign of each weight",
        "scales" / Vector(4, "B", "u8") * "per 32 weights, low nibble first: scale",
    ),
)
IQ2_S = ForeignType(
    "IQ2_S",
    22,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "qs" / Vector(32, "B", "u8") * "per 8 weights: low 8 bits of the index",
        "signs" / Vector(32, "B", "u8") * "sign of each weight",
        "qh" / Vector(8, "B", "u8") * "per 32 weights: high 2 bits of 4 indices",
        "scales" / Vector(8, "B", "u8") * "per 16 weights, low nibble first: scale",
    ),
)
IQ4_XS = ForeignType(
    "IQ4_XS",
    23,
    QK_K,
    Layout(
        "d" / Scalar("e", "f16") * "scale of the scales",
        "scales_h" / Scalar("H", "u16") * "per 32 weights: high 2 bits of the scale + 32",
        "scales_l" / Vector(4, "B", "u8") * "per 32 weights, low nibble first: low 4 bits of the scale + 32",
        "qs" / Vector(128, "B", "u8") * "codes: byte 16g + j holds elements 32g + j (low nibble) and 32g + j + 16",
    ),
)
IQ1_M = ForeignType(
    "IQ1_M",
    29,
    QK_K,
    Layout(
        "qs" / Vector(32, "B", "u8") * "per 8 weights: low 8 bits of the index",
        "qh"
        / Vector(16, "B", "u8")
        * "per 8 weights, low nibble first: high 3 bits of the index, whether 1/8 is subtracted or added",
        "scales" / Vector(4, "H", "u16") * "per 16 weights: scale of 3 bits; the high 4 bits of all are the f16 `d`",
    ),
)
TQ1_0 = ForeignType(
    "TQ1_0",
    34,
    QK_K,
    Layout(
        "qs"
        / Vector(48, "B", "u8")
        * "5 digits of base 3: byte l < 32 holds elements l, l + 32, ...; byte 32 + l elements 160 + l, + 16, ...",
        "qh" / Vector(4, "B", "u8") * "4 digits of base 3: byte l holds elements 240 + l, + 4, + 8, + 12",
        "d" / Scalar("e", "f16") * "scale",
    ),
)
TQ2_0 = ForeignType(
    "TQ2_0",
    35,
    QK_K,
    Layout(
        "qs" / Vector(64, "B", "u8") * "2-bit codes + 1, arranged as in Q2K",
        "d" / Scalar("e", "f16") * "scale",
    ),
)
MXFP4 = ForeignType(
    "MXFP4",
    39,
    QK,
    Layout(
        "e" / Scalar("B", "u8") * "exponent of the scale, bias 127",
        "qs" / Vector(16, "B", "u8") * "E2M1: byte j holds element j (low nibble) and j + 16 (high nibble)",
    ),
)
NVFP4 = ForeignType(
    "NVFP4",
    40,
    2 * QK,
    Layout(
        "d" / Vector(4, "B", "u8") * "per 16 weights: scale in E4M3 without a sign",
        "qs" / Vector(32, "B", "u8") * "E2M1: byte 8g + j holds elements 16g + j (low nibble) and 16g + j + 8",
    ),
)
I8 = ForeignType("I8", 24, 1, Layout("x" / Scalar("b", "i8") * "the number"))
I16 = ForeignType("I16", 25, 1, Layout("x" / Scalar("h", "i16") * "the number"))
I32 = ForeignType("I32", 26, 1, Layout("x" / Scalar("i", "i32") * "the number"))
I64 = ForeignType("I64", 27, 1, Layout("x" / Scalar("q", "i64") * "the number"))
F64 = ForeignType("F64", 28, 1, Layout("x" / Scalar("d", "f64") * "the number"))

FOREIGN_TYPES: Final = (
    *(IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, I8, I16, I32, I64, F64, IQ1_M),
    *(TQ1_0, TQ2_0, MXFP4, NVFP4),
)
"""Those that are read, by code."""

UNREAD_TYPES: Final = {
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    41: "Q1_0",
}
"""Those that are not, to call them by in messages: blocks repacked for a CPU, which ggml itself has given up, and one
that has no reference dequantiser in gguf-py."""

_BY_CODE: Final = {each.code: each for each in FOREIGN_TYPES}


def ggml_type(code: int) -> BlockType | None:
    """The type of ggml's own number: UQFF's, or a foreign one; None if it is not read."""
    return block_type_of_code(code) or _BY_CODE.get(code)


def type_name(code: int) -> str:
    """A type as UQFF or else ggml spells it."""
    known = ggml_type(code)
    return UNREAD_TYPES.get(code, f"ggml type {code}") if known is None else known.name
