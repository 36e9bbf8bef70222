"""The bricks of a declared layout, on top of ``construct``: everything but the layout itself.

``construct`` supplies the integers, the combinators and the declaration syntax (``"name" / brick * "meaning"``).  Added
here is what a file of gigabytes needs: payloads that are never copied, and errors that name field and offset.

===========  ===========================================================================================
brick        what it declares
===========  ===========================================================================================
``Span``     "n bytes here": bounds-checked, parsed to a view, built by appending
``Scalar``   a fixed-size number kept as its bytes, so that every bit pattern survives a round trip
``Vector``   a fixed count of such numbers
``Dims``     as many u32 as a field before says
``Checked``  an integer that only certain values may have
``Derived``  an integer that follows from later fields: computed on building
===========  ===========================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from construct import Construct, Int8ul, Int32ul, Subconstruct

from uqff.errors import FormatError, UqffError
from uqff.limits import MAX_RANK, U32_MAX

__all__ = [
    "U8",
    "U32",
    "Checked",
    "Cursor",
    "Derived",
    "Dims",
    "FieldTrace",
    "Placeholder",
    "Scalar",
    "Scope",
    "Sink",
    "Span",
    "Vector",
    "Violation",
]

U8 = Int8ul
U32 = Int32ul

Scope = Mapping[str, Any]
"""The fields of the enclosing layout that stand before the present one."""

_T = TypeVar("_T")
_NUMPY = {
    **dict(zip("BbHhIiq", ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8"), strict=True)),
    **dict(zip("efd", ("<f2", "<f4", "<f8"), strict=True)),
}


class Violation(Exception):
    """A broken rule, raised by a brick that knows neither its name nor its offset."""

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        expected: object = None,
        got: object = None,
        error: type[UqffError] = FormatError,
        rule: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.field = field
        self.expected = expected
        self.got = got
        self.error = error
        self.rule = rule

    def as_error(self, field: str | None = None) -> UqffError:
        """The error to raise where the place is known by name only.

        Args:
            field: its name there, if it is another than the violation gives.
        """
        where = field or self.field
        return self.error(self.problem, field=where, expected=self.expected, got=self.got, rule=self.rule)


class FieldTrace(NamedTuple):
    """One parsed field: where it lies and what it says."""

    path: str
    offset: int
    size: int
    type: str
    value: Any
    meaning: str


@dataclass(frozen=True)
class Placeholder:
    """Stands for payload bytes that do not exist yet, where only their number matters."""

    nbytes: int


class Cursor:
    """A read-only stream over a buffer that hands out views, never copies."""

    __slots__ = ("_at", "_view", "trace")

    def __init__(self, view: memoryview, trace: list[FieldTrace] | None = None) -> None:
        self._view = view
        self._at = 0
        self.trace = trace

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._at

    def seek(self, offset: int) -> None:
        """Go back to an offset."""
        self._at = offset

    @property
    def remaining(self) -> int:
        """How many bytes are left."""
        return len(self._view) - self._at

    def read(self, count: int) -> memoryview:
        """A view of the next ``count`` bytes; refuses, without moving, if there are fewer."""
        end = self._at + count
        if end > len(self._view):
            raise Violation("truncated", rule="BLOB-01", expected=f"{count} bytes", got=f"{self.remaining} left")
        chunk = self._view[self._at : end]
        self._at = end
        return chunk


class Sink:
    """A write-only stream that collects chunks without joining them, and counts."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.nbytes = 0

    def write(self, chunk: bytes) -> int:
        """Append small bytes (construct's protocol)."""
        self.append(chunk, len(chunk))
        return len(chunk)

    def append(self, chunk: Any, nbytes: int) -> None:
        """Append anything that stands for ``nbytes`` bytes."""
        if nbytes:
            self.chunks.append(chunk)
        self.nbytes += nbytes


class Span(Construct):  # type: ignore[misc]
    """``size`` bytes of payload: parsed to a memoryview, built from anything with ``nbytes``.

    Args:
        size: the number of bytes, from the fields before it.
        label: how the spec writes that number.
        declared: name of a u32 field before it that states the size too. Old writers of the engine let it wrap at
            4 GiB, so it is compared modulo 2**32 and the computed size counts.
    """

    def __init__(self, size: Callable[[Any], int], label: str, *, declared: str | None = None) -> None:
        super().__init__()
        self.size = size
        self.label = label
        self.declared = declared

    def _parse(self, stream: Cursor, context: Any, path: str) -> memoryview:
        size = self.size(context)
        if self.declared is not None and context[self.declared] != size & U32_MAX:
            raise Violation(
                "length does not fit shape and dtype",
                field=self.declared,
                expected=size,
                got=context[self.declared],
                rule="BLOB-09",
            )
        return stream.read(size)

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        size = self.size(context)
        if obj.nbytes != size:
            raise Violation("payload has the wrong size", expected=f"{size} bytes", got=f"{obj.nbytes}")
        stream.append(obj, size)
        return obj


class Scalar(Construct):  # type: ignore[misc]
    """A little-endian number of fixed size, kept as bytes: a signalling NaN would not survive a Python float."""

    def __init__(self, code: str, label: str) -> None:
        super().__init__()
        self.code = struct.Struct("<" + code)
        self.label = label

    def _parse(self, stream: Cursor, context: Any, path: str) -> memoryview:
        return stream.read(self.code.size)

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        if obj.nbytes != self.code.size:
            raise Violation("number has the wrong size", expected=f"{self.code.size} bytes", got=f"{obj.nbytes}")
        stream.append(obj, self.code.size)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        return self.code.size

    def decode(self, raw: memoryview) -> Any:
        """The number, for people to read."""
        return self.code.unpack(raw)[0]

    @property
    def numpy(self) -> tuple[str, tuple[int, ...]]:
        """The same as a numpy dtype string and the shape of one such field."""
        return _NUMPY[self.code.format[-1]], ()


class Vector(Scalar):
    """A fixed number of equal little-endian numbers."""

    def __init__(self, count: int, code: str, label: str) -> None:
        super().__init__(f"{count}{code}", f"{label} × {count}")
        self.count = count

    def decode(self, raw: memoryview) -> list[Any]:
        """The numbers, for people to read."""
        return list(self.code.unpack(raw))

    @property
    def numpy(self) -> tuple[str, tuple[int, ...]]:
        """The same as a numpy dtype string and the shape of one such field."""
        return _NUMPY[self.code.format[-1]], (self.count,)


class Dims(Construct):  # type: ignore[misc]
    """A shape: as many u32 as the field ``count`` says, row major, none of them 0."""

    itemsize = 4

    def __init__(self, count: str = "ndim") -> None:
        super().__init__()
        self.count = count

    def _parse(self, stream: Cursor, context: Any, path: str) -> tuple[int, ...]:
        ndim = context[self.count]
        if ndim > MAX_RANK:
            expected = f"at most {MAX_RANK}"
            raise Violation("too many dimensions", field=self.count, expected=expected, got=ndim, rule="BLOB-12")
        dims: tuple[int, ...] = struct.unpack(f"<{ndim}I", stream.read(4 * ndim))
        if 0 in dims:
            raise Violation("empty dimension", expected="every dimension at least 1", got=list(dims), rule="BLOB-12")
        return dims

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        if len(obj) > MAX_RANK:
            raise Violation("too many dimensions", expected=f"at most {MAX_RANK}", got=len(obj))
        if not all(1 <= dim <= U32_MAX for dim in obj):
            raise Violation("dimension out of range", expected="1 to 2**32 - 1", got=list(obj))
        stream.write(struct.pack(f"<{len(obj)}I", *obj))
        return obj


class Checked(Subconstruct, Generic[_T]):  # type: ignore[misc]
    """An integer with a meaning: ``decode`` gives it or raises Violation, ``encode`` gives the integer back."""

    def __init__(
        self, subcon: Construct, decode: Callable[[int], _T], encode: Callable[[_T], int], *, label: str = ""
    ) -> None:
        super().__init__(subcon)
        self.decode = decode
        self.encode = encode
        self.label = label

    def _parse(self, stream: Cursor, context: Any, path: str) -> _T:
        return self.decode(self.subcon._parse(stream, context, path))

    def _build(self, obj: _T, stream: Sink, context: Any, path: str) -> _T:
        number = self.encode(obj)
        self.decode(number)
        self.subcon._build(number, stream, context, path)
        return obj

    @classmethod
    def choice(cls, subcon: Construct, *allowed: int, rule: str | None = None) -> Checked[int]:
        """An integer out of a list, by a rule."""

        def decode(number: int) -> int:
            if number not in allowed:
                expected = " or ".join(map(str, allowed))
                raise Violation("value out of range", expected=expected, got=number, rule=rule)
            return number

        return Checked(subcon, decode, int)


class Derived(Subconstruct):  # type: ignore[misc]
    """An integer that later fields determine: parsed as stored (whoever uses it checks it), computed on building.

    Args:
        subcon: the integer.
        value: computes it from the fields to be built; a value above the integer's range is an error.
    """

    def __init__(self, subcon: Construct, value: Callable[[Any], int]) -> None:
        super().__init__(subcon)
        self.flagbuildnone = True
        self.value = value

    def _parse(self, stream: Cursor, context: Any, path: str) -> int:
        number: int = self.subcon._parse(stream, context, path)
        return number

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> int:
        value = self.value(context)
        top = 256 ** int(self.subcon.sizeof()) - 1
        if value > top:
            raise Violation("does not fit its field", expected=f"at most {top}", got=value)
        self.subcon._build(value, stream, context, path)
        return value
