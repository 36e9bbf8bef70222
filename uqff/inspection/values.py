"""Decoded field values, for people and for JSON."""

from __future__ import annotations

import math
import struct
from typing import Any

from uqff.codes import DType, Family, Version
from uqff.families.gguf.blocks import BlockType

__all__ = ["decode_elements", "json_value", "number_text", "value_text"]

_STRUCT = {
    DType.U8: "B",
    DType.U32: "I",
    DType.I32: "i",
    DType.I64: "q",
    DType.F16: "e",
    DType.F32: "f",
    DType.F64: "d",
    DType.I16: "h",
}
_LISTED = 8
"""How many numbers of a list are shown."""


def decode_elements(data: memoryview, dtype: DType, count: int) -> list[int | float]:
    """The first ``count`` elements of a tensor's bytes, fewer if there are fewer."""
    raw = bytes(data[: count * dtype.itemsize])
    if dtype is DType.BF16:
        return [struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0] for at in range(0, len(raw), 2)]
    if dtype is DType.F8E4M3:
        return [_e4m3(code) for code in raw]
    return list(struct.unpack(f"<{len(raw) // dtype.itemsize}{_STRUCT[dtype]}", raw))


def _e4m3(code: int) -> float:
    """``s eeee mmm``, bias 7; no infinities, all ones is NaN (OCP 8-bit floating point, E4M3)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * math.ldexp(mantissa + 8, exponent - 10) if exponent else sign * math.ldexp(mantissa, -9)


def number_text(number: float) -> str:
    """A number as short as float32 allows."""
    return str(number) if isinstance(number, int) else f"{number:.9g}"


def value_text(value: Any) -> str:
    """A decoded value for people; empty for payload."""
    if isinstance(value, Version):
        return str(value)
    if isinstance(value, Family):
        return f"{value.value} {value.title}"
    if isinstance(value, (DType, BlockType)):
        return f"{value.code} {value.name}"
    if isinstance(value, (int, float)):
        return number_text(value)
    if isinstance(value, (tuple, list)):
        more = f", ... {len(value)} in all" if len(value) > _LISTED else ""
        return "[" + ", ".join(map(number_text, value[:_LISTED])) + more + "]"
    return ""


def json_value(value: Any) -> Any:
    """A decoded value for JSON: numbers, texts, lists, ``{"code", "name"}``, or None for payload.

    JSON has no infinities and no NaN: they are the texts ``"Infinity"``, ``"-Infinity"``, ``"NaN"``.
    """
    if isinstance(value, Version):
        return str(value)
    if isinstance(value, Family):
        return {"code": value.value, "name": value.title}
    if isinstance(value, (DType, BlockType)):
        return {"code": value.code, "name": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return [json_value(item) for item in value]
    return None
