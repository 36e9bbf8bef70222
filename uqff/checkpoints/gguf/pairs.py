"""Metadata of a GGUF file under a prefix, checked when it is asked for: counts, numbers, flags."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from uqff.errors import FormatError
from uqff.gguf.reader import GgufFile
from uqff.gguf.schema import Array, ValueType
from uqff.limits import MAX_BLOCKS

__all__ = ["FLOATS", "INTEGERS", "Pairs"]

INTEGERS: Final = (
    ValueType.U32,
    ValueType.I32,
    ValueType.U64,
    ValueType.I64,
    ValueType.U16,
    ValueType.I16,
    ValueType.U8,
    ValueType.I8,
)
FLOATS: Final = (ValueType.F32, ValueType.F64)


class Pairs:
    """The metadata of a file whose keys begin alike.

    Attributes:
        file: the file.
        prefix: of the keys, without the dot.
    """

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def get(self, key: str, types: tuple[ValueType, ...]) -> Any:
        """A value of one of some types; None if there is none.

        Raises:
            FormatError: it has another type.
        """
        return self.file.get_value(f"{self.prefix}.{key}", *types)

    def integer(self, key: str, *, least: int = 1, default: int | None = None) -> int:
        """A count; of an array, the value that all its elements have.

        Raises:
            FormatError: there is none and no default, or it is senseless.
        """
        value = self.get(key, (*INTEGERS, ValueType.ARRAY))
        if isinstance(value, Array):
            values = set(value.values()) if value.type in INTEGERS else set()
            if len(values) != 1:
                raise self.error("layers differ", key, "one number for all layers", sorted(values)[:5])
            value = values.pop()
        if value is None and default is not None:
            return default
        if value is None or not least <= value < 2**31:
            expected = f"a number from {least} to {2**31 - 1}"
            raise self.error("not a count", key, expected, "none" if value is None else value)
        return int(value)

    def blocks(self, key: str = "block_count") -> int:
        """How many blocks there are: no more than a model has, as each of their tensors is looked for.

        Raises:
            FormatError: see :meth:`integer`; or there are more.
        """
        announced = self.integer(key)
        if announced > MAX_BLOCKS:
            raise self.error("more layers than any model has", key, f"at most {MAX_BLOCKS}", announced)
        return announced

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0: the shortest decimal that rounds to it in float32.

        Raises:
            FormatError: there is none and no default, or it is senseless.
        """
        value = self.get(key, FLOATS)
        if value is None and default is not None:
            return default
        with np.errstate(over="ignore", under="ignore"):  # float64 has numbers that float32 makes infinite, or zero
            rounded = np.float32(0 if value is None else value)
        if not np.isfinite(rounded) or rounded <= 0:
            raise self.error("not a number", key, "above 0, in float32", "none" if value is None else value)
        return float(str(rounded))

    def numbers(self, key: str, count: int) -> list[float]:
        """So many numbers, likewise.

        Raises:
            FormatError: there are none, or others.
        """
        value = self.get(key, (ValueType.ARRAY,))
        found = value.values() if isinstance(value, Array) and value.type in FLOATS and value.count == count else []
        with np.errstate(over="ignore"):
            made = [float(str(np.float32(each))) for each in found]
        if len(made) != count or not np.isfinite(made).all():
            got = f"{value.count} of them" if isinstance(value, Array) else "none"
            raise self.error("not numbers", key, f"{count} numbers", got)
        return made

    def flag(self, key: str) -> bool | None:
        """Whether something is so; None if nobody says."""
        value: bool | None = self.get(key, (ValueType.BOOL,))
        return value

    def error(self, problem: str, key: str, expected: object, got: object) -> FormatError:
        """The error of a value."""
        path = str(self.file.paths[0])
        return FormatError(problem, file=path, field=f"{self.prefix}.{key}", expected=expected, got=got)
