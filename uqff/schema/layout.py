"""The bricks of a declared layout, on top of ``construct``.

``construct`` supplies the integers, the combinators and the declaration syntax (``"name" / brick * "meaning"``).  Added
here is what a file of gigabytes needs: payloads that are never copied, errors that name field and offset, a trace of
which bytes belong to which field, and a table of offsets to print.

==============  ========================================================================================
brick           what it declares
==============  ========================================================================================
``Layout``      named fields, one after another; may be a field of another layout
``Span``        "n bytes here": bounds-checked, parsed to a view, built by appending
``Scalar``      a fixed-size number kept as its bytes, so that every bit pattern survives a round trip
``Vector``      a fixed count of such numbers
``Dims``        as many u32 as a field before says
``Checked``     an integer that only certain values may have
``Derived``     an integer that follows from later fields: computed on building
``Extension``   a layout that is present if a flag before it says so
==============  ========================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import construct
from construct import Construct, Container, Int8ul, Int32ul, Renamed, Subconstruct

from uqff.errors import FormatError, UqffError
from uqff.limits import MAX_RANK, U32_MAX

__all__ = [
    "U8",
    "U32",
    "Checked",
    "Cursor",
    "Derived",
    "Dims",
    "Extension",
    "FieldTrace",
    "Layout",
    "Placeholder",
    "Row",
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
_NUMPY = {"B": "u1", "b": "i1", "H": "<u2", "h": "<i2", "I": "<u4", "e": "<f2", "f": "<f4"}


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
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.field = field
        self.expected = expected
        self.got = got
        self.error = error


class FieldTrace(NamedTuple):
    """One parsed field: where it lies and what it says."""

    path: str
    offset: int
    size: int
    type: str
    value: Any
    meaning: str


class Row(NamedTuple):
    """One line of a spec offset table; offset and size are texts because some depend on other fields."""

    offset: str
    size: str
    field: str
    type: str
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
            raise Violation("truncated", expected=f"{count} bytes", got=f"{self.remaining} left")
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
                "length does not fit shape and dtype", field=self.declared, expected=size, got=context[self.declared]
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

    def __init__(self, count: str = "ndim") -> None:
        super().__init__()
        self.count = count

    def _parse(self, stream: Cursor, context: Any, path: str) -> tuple[int, ...]:
        ndim = context[self.count]
        if ndim > MAX_RANK:
            raise Violation("too many dimensions", field=self.count, expected=f"at most {MAX_RANK}", got=ndim)
        dims: tuple[int, ...] = struct.unpack(f"<{ndim}I", stream.read(4 * ndim))
        if 0 in dims:
            raise Violation("empty dimension", expected="every dimension at least 1", got=list(dims))
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
    def choice(cls, subcon: Construct, *allowed: int) -> Checked[int]:
        """An integer out of a list."""

        def decode(number: int) -> int:
            if number not in allowed:
                raise Violation("value out of range", expected=" or ".join(map(str, allowed)), got=number)
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


class Extension(Subconstruct):  # type: ignore[misc]
    """A layout that follows only if the field ``flag`` is 1; None otherwise."""

    def __init__(self, flag: str, subcon: Layout) -> None:
        super().__init__(subcon)
        self.flag = flag

    def _parse(self, stream: Cursor, context: Any, path: str) -> Any:
        return self.subcon._parse(stream, context, path) if context[self.flag] else None

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        return obj if obj is None else self.subcon._build(obj, stream, context, path)


class Layout(construct.Struct):  # type: ignore[misc]
    """Named fields, one after another, with everything that can be derived from their declaration.

    A field sees the fields before it in the same layout and nothing else.
    """

    def __init__(self, *fields: Construct, label: str = "") -> None:
        super().__init__(*fields)
        self.label = label
        self._fields = tuple((field.name, _unwrapped(field), field.docs) for field in fields)
        if any(not name or not meaning for name, _, meaning in self._fields):
            raise TypeError("every field of a layout has a name and a meaning")
        self._runs = _runs_of(self._fields)

    def _parse(self, stream: Cursor, context: Any, path: str) -> Container:
        if stream.trace is None:
            start = stream.tell()
            try:
                return self._parse_runs(stream)
            except (Violation, UqffError):
                stream.seek(start)  # parsed again, field by field, to name the one that is wrong
        return self._parse_fields(stream, path)

    def _parse_runs(self, stream: Cursor) -> Container:
        """Parse sound bytes quickly: every run of integers with one ``struct`` call."""
        scope = Container()
        for run, names, decoders, brick in self._runs:
            if run is None:
                scope[names[0]] = brick._parse(stream, scope, "")
                continue
            for name, decode, number in zip(names, decoders, run.unpack(stream.read(run.size)), strict=True):
                scope[name] = number if decode is None else decode(number)
        return scope

    def _parse_fields(self, stream: Cursor, path: str) -> Container:
        scope = Container()
        starts: dict[str, int] = {}
        trace = stream.trace
        for name, brick, meaning in self._fields:
            start = starts[name] = stream.tell()
            first = 0 if trace is None else len(trace)
            try:
                value = brick._parse(stream, scope, path)
            except Violation as broken:
                raise broken.error(
                    broken.problem,
                    field=broken.field or name,
                    offset=starts.get(broken.field or name, start),
                    expected=broken.expected,
                    got=broken.got,
                ) from None
            except UqffError as error:
                raise error.within(prefix=name) from None
            scope[name] = value
            if trace is not None:
                nested = trace[first:]
                if nested:
                    trace[first:] = [t._replace(path=f"{name}.{t.path}") for t in nested]
                elif stream.tell() > start:
                    shown = brick.decode(value) if isinstance(brick, Scalar) else value
                    trace.append(FieldTrace(name, start, stream.tell() - start, type_label(brick), shown, meaning))
        return scope

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        scope = Container(obj)
        for name, brick, _ in self._fields:
            try:
                scope[name] = brick._build(scope.get(name), stream, scope, path)
            except Violation as broken:
                raise broken.error(
                    broken.problem, field=broken.field or name, expected=broken.expected, got=broken.got
                ) from None
            except UqffError as error:
                raise error.within(prefix=name) from None
        return scope

    def read(self, buffer: Any, *, trace: list[FieldTrace] | None = None, exact: bool = True) -> Container:
        """Parse a buffer. Payloads are views of it.

        Args:
            buffer: any bytes-like object.
            trace: a list that receives every field with its place.
            exact: refuse bytes after the last field.

        Raises:
            FormatError: with field path and offset.
        """
        view = memoryview(buffer).cast("B")
        stream = Cursor(view, trace)
        fields = self._parse(stream, None, "")
        if exact and stream.remaining:
            raise FormatError(
                "trailing bytes",
                offset=stream.tell(),
                expected=f"{stream.tell()} bytes",
                got=f"{len(view)}",
            )
        return fields

    def chunks(self, fields: Mapping[str, Any]) -> list[Any]:
        """Build: the list of byte chunks, payloads among them as they were given."""
        sink = Sink()
        self._build(fields, sink, None, "")
        return sink.chunks

    def nbytes(self, fields: Mapping[str, Any]) -> int:
        """How many bytes :meth:`chunks` would give; payloads may be :class:`Placeholder`."""
        sink = Sink()
        self._build(fields, sink, None, "")
        return sink.nbytes

    @property
    def fixed_size(self) -> int:
        """The size of a layout that has no field of variable size."""
        terms = [size_terms(brick) for _, brick, _ in self._fields]
        if any(variable for _, variable in terms):
            raise TypeError("the layout has fields of variable size")
        return sum(fixed for fixed, _ in terms)

    @property
    def members(self) -> tuple[tuple[str, Construct, str], ...]:
        """Name, brick and meaning of every field, in file order."""
        return self._fields

    def rows(self) -> list[Row]:
        """The offset table of the spec. A field after one of variable size is placed relative to it."""
        rows: list[Row] = []
        base, constant = "", 0
        for name, brick, meaning in self._fields:
            offset = f"{base} + {constant}" if base and constant else base or str(constant)
            fixed, variable = size_terms(brick)
            size = " + ".join(filter(None, [str(fixed) if fixed or not variable else "", variable]))
            rows.append(Row(offset, size, name, type_label(brick), meaning))
            constant += fixed
            if variable:
                if isinstance(brick, (Layout, Extension, Span)):
                    base, constant = f"end of `{name}`", 0
                else:
                    base = f"{base} + {variable}" if base else variable
        return rows


def _unwrapped(brick: Construct) -> Construct:
    """The brick behind its name and its meaning, each of which construct puts around it."""
    while isinstance(brick, Renamed):
        brick = brick.subcon
    return brick


_Run = tuple[struct.Struct | None, tuple[str, ...], tuple[Callable[[int], Any] | None, ...], Any]


def _runs_of(fields: tuple[tuple[str, Construct, str], ...]) -> list[_Run]:
    """Group neighbouring integers: (struct, names, decoders, None) a run, (None, (name,), (), brick) anything else."""
    runs: list[_Run] = []
    for name, brick, _ in fields:
        decode = brick.decode if isinstance(brick, Checked) else None
        number = brick
        while isinstance(number, (Checked, Derived)):
            decode = decode or (number.decode if isinstance(number, Checked) else None)
            number = number.subcon
        if not isinstance(number, construct.FormatField):
            runs.append((None, (name,), (), brick))
            continue
        run, names, decoders, _ = runs[-1] if runs else (None, (), (), None)
        if run is None:
            runs.append((struct.Struct(number.fmtstr), (name,), (decode,), None))
        else:
            runs[-1] = (struct.Struct(run.format + number.fmtstr[1:]), (*names, name), (*decoders, decode), None)
    return runs


def size_terms(brick: Construct) -> tuple[int, str]:
    """The size of a brick as a number of bytes and a text for what depends on other fields."""
    if isinstance(brick, Span):
        return 0, brick.label
    if isinstance(brick, Dims):
        return 0, f"4·{brick.count}"
    if isinstance(brick, Extension):
        return 0, f"{brick.subcon.label} or 0"
    if isinstance(brick, Layout):
        return 0, brick.label
    return int(brick.sizeof()), ""


def type_label(brick: Construct) -> str:
    """The type of a brick as the spec writes it."""
    if isinstance(brick, Checked) and brick.label:
        return brick.label
    if isinstance(brick, (Checked, Derived)):
        return type_label(brick.subcon)
    if isinstance(brick, Extension):
        return f"[{type_label(brick.subcon)}]"
    if isinstance(brick, (Layout, Scalar)):
        return brick.label
    if isinstance(brick, Dims):
        return f"u32 × {brick.count}"
    if isinstance(brick, Span):
        return "bytes"
    return {1: "u8", 2: "u16", 4: "u32"}[int(brick.sizeof())]
