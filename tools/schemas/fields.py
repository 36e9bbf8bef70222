"""Declared layouts as plain fields: names, numbers, counts and conditions, as other languages of layouts have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from construct import Construct, FormatField

from uqff.codes import VERSIONS, DType, Family
from uqff.families.f8q8 import tensor as f8q8
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.limits import MAX_RANK
from uqff.schema.bricks import Checked, Derived, Dims, Scalar, Span, Vector, Violation
from uqff.schema.layout import Extension, Layout
from uqff.schema.tensor import TENSOR

NUMBERS: Final = {"B": "u1", "b": "s1", "H": "u2", "h": "s2", "I": "u4", "e": "u2", "f": "f4", "d": "f8"}
"""Codes of ``struct`` to names of numbers: kind and bytes. Floats of 16 bits are kept as their bits."""
OF_DTYPE: Final = {
    DType.U8: "u1",
    DType.U32: "u4",
    DType.I32: "s4",
    DType.I64: "s8",
    DType.F16: "u2",
    DType.BF16: "u2",
    DType.F32: "f4",
    DType.F64: "f8",
    DType.I16: "s2",
    DType.F8E4M3: "u1",
}
"""The number of each dtype that can be stored."""

DTYPES: Final = tuple(dtype for dtype in sorted(DType, key=lambda each: each.code))
BLOCKS: Final[dict[str, Layout]] = {
    **{block_type.kind: block_type.layout for block_type in BLOCK_TYPES},
    "f8q8": f8q8.BLOCK,
}
"""Layouts of blocks, by type."""

VERSION_WORDS: Final = tuple(each.major << 16 | each.minor << 8 | each.patch for each in VERSIONS)
_PROBED: Final = (*range(256), *VERSION_WORDS)
_ENUMS: Final[dict[type, str]] = {DType: "dtype", Family: "family", BlockType: "ggml_type"}


@dataclass(frozen=True)
class Field:
    """One field of a layout.

    Attributes:
        name: as the layout has it.
        meaning: one phrase.
        number: what it is, or each of its elements: ``u4``, ``f4``, ...; empty for bytes and for layouts.
        count: how many there are, or the field that says so; one if None.
        size: bytes of a payload, in words of the fields before it; empty for anything else.
        holds: what a payload, or a layout within, is: ``numbers``, ``ggml_blocks``, ``f8q8_blocks``, ``tensor``.
        enum: the list of codes that it is one of.
        allowed: the only values that it may have.
        least: the least value that it may have.
        most: the greatest.
        flag: the field that says whether it is there.
    """

    name: str
    meaning: str
    number: str = ""
    count: int | str | None = None
    size: str = ""
    holds: str = ""
    enum: str = ""
    allowed: tuple[int, ...] = ()
    least: int | None = None
    most: int | None = None
    flag: str = ""


def fields_of(layout: Layout) -> list[Field]:
    """The fields of a layout, in file order."""
    counts = {brick.count for _, brick, _ in layout.members if isinstance(brick, Dims)}
    return [_field(layout, name, brick, meaning, name in counts) for name, brick, meaning in layout.members]


def body_of(layout: Layout) -> list[Field]:
    """The fields of a blob behind its header."""
    return [field for field in fields_of(layout) if field.name not in ("version", "quant_type")]


def value_of(layout: Layout, name: str) -> Field:
    """One field of a layout, by name."""
    return next(field for field in fields_of(layout) if field.name == name)


def _field(layout: Layout, name: str, brick: Construct, meaning: str, counts: bool) -> Field:
    if isinstance(brick, Extension):
        return Field(name, meaning, holds="tensor", flag=brick.flag)
    if isinstance(brick, Layout):
        return Field(name, meaning, holds="tensor")
    if isinstance(brick, Span):
        return Field(name, meaning, size=brick.label.replace("·", " * "), holds=_payload(layout))
    if isinstance(brick, Dims):
        return Field(name, meaning, "u4", brick.count, least=1)
    if isinstance(brick, Vector):
        return Field(name, meaning, NUMBERS[brick.code.format[-1]], brick.count)
    if isinstance(brick, Scalar):
        return Field(name, meaning, NUMBERS[brick.code.format[-1]])
    enum, least = "", None
    allowed: tuple[int, ...] = ()
    while isinstance(brick, (Checked, Derived)):
        if isinstance(brick, Checked):
            enum, allowed, least = _values(brick)
        brick = brick.subcon
    if not isinstance(brick, FormatField):
        raise TypeError(f"{name}: a brick that has no schema")
    most = MAX_RANK if counts else None
    return Field(name, meaning, f"u{brick.sizeof()}", enum=enum, allowed=allowed, least=least, most=most)


def _payload(layout: Layout) -> str:
    names = {name for name, _, _ in layout.members}
    if layout is TENSOR:
        return "numbers"
    return "ggml_blocks" if "ggml_dtype" in names else "f8q8_blocks"


def _values(brick: Checked[Any]) -> tuple[str, tuple[int, ...], int | None]:
    """The list of codes, the allowed values and the least one, as far as trying small numbers tells."""
    known: dict[int, Any] = {}
    for number in _PROBED:
        try:
            known[number] = brick.decode(number)
        except Violation:
            continue
    enums = {_ENUMS[type(value)] for value in known.values() if type(value) in _ENUMS}
    if enums:
        return enums.pop(), (), None
    if len(known) > len(_PROBED) // 2:
        least = min(known)
        return "", (), least or None
    return "", tuple(sorted(known)), None
