"""The layout: named bricks, one after another, and everything that is read off their declaration.

A :class:`Layout` parses, builds, computes sizes, says which bytes belong to which field, and prints the offset table of
the spec.  :class:`Extension` is a layout within one that is present only if a flag before it says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import construct
from construct import Construct, Renamed, Subconstruct

from uqff.errors import FormatError, UqffError, located
from uqff.schema.bricks import (
    Checked,
    Cursor,
    Derived,
    Dims,
    FieldTrace,
    Scalar,
    Sink,
    Span,
    Violation,
)

__all__ = ["Extension", "Layout", "Row", "offset_of_field", "size_terms", "type_label"]


class Row(NamedTuple):
    """One line of a spec offset table; offset and size are texts because some depend on other fields."""

    offset: str
    size: str
    field: str
    type: str
    meaning: str


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

    def _parse(self, stream: Cursor, context: Any, path: str) -> dict[str, Any]:
        if stream.trace is None:
            start = stream.tell()
            try:
                return self._parse_runs(stream)
            except (Violation, UqffError):
                stream.seek(start)  # parsed again, field by field, to name the one that is wrong
        return self._parse_fields(stream, path)

    def _parse_runs(self, stream: Cursor) -> dict[str, Any]:
        """Parse sound bytes quickly: every run of integers with one ``struct`` call."""
        scope: dict[str, Any] = {}
        for run, names, decoders, brick in self._runs:
            if run is None:
                scope[names[0]] = brick._parse(stream, scope, "")
                continue
            for name, decode, number in zip(names, decoders, run.unpack(stream.read(run.size)), strict=True):
                scope[name] = number if decode is None else decode(number)
        return scope

    def _parse_fields(self, stream: Cursor, path: str) -> dict[str, Any]:
        scope: dict[str, Any] = {}
        starts: dict[str, int] = {}
        trace = stream.trace
        for name, brick, meaning in self._fields:
            start = starts[name] = stream.tell()
            first = 0 if trace is None else len(trace)
            try:
                with located(prefix=name):
                    value = brick._parse(stream, scope, path)
            except Violation as broken:
                raise broken.error(
                    broken.problem,
                    field=broken.field or name,
                    offset=starts.get(broken.field or name, start),
                    expected=broken.expected,
                    got=broken.got,
                    rule=broken.rule,
                ) from None
            except construct.StreamError:
                # construct hides the cursor's Violation behind an error of its own, without place and size.
                raise FormatError(
                    "truncated",
                    field=name,
                    offset=start,
                    expected=f"{brick.sizeof()} bytes",
                    got=f"{stream.remaining} left",
                    rule="BLOB-01",
                ) from None
            except UqffError:
                if trace is not None:
                    _put_within(name, trace, first)
                raise
            scope[name] = value
            if trace is not None:
                if len(trace) > first:
                    _put_within(name, trace, first)
                elif stream.tell() > start:
                    shown = brick.decode(value) if isinstance(brick, Scalar) else value
                    trace.append(FieldTrace(name, start, stream.tell() - start, type_label(brick), shown, meaning))
        return scope

    def _build(self, obj: Any, stream: Sink, context: Any, path: str) -> Any:
        scope: dict[str, Any] = dict(obj)
        for name, brick, _ in self._fields:
            try:
                with located(prefix=name):
                    scope[name] = brick._build(scope.get(name), stream, scope, path)
            except Violation as broken:
                raise broken.as_error(broken.field or name) from None
            except construct.FormatFieldError as exc:
                raise FormatError(
                    "does not fit its field", field=name, expected=type_label(brick), got=scope.get(name)
                ) from exc
        return scope

    def read(self, buffer: Any, *, trace: list[FieldTrace] | None = None, exact: bool = True) -> dict[str, Any]:
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
                rule="BLOB-02",
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
    def offsets(self) -> tuple[int, ...]:
        """Where each field begins, of a layout of fixed size: in file order, for kernels to unpack."""
        sizes = [size_terms(brick)[0] for _, brick, _ in self._fields]
        return tuple(sum(sizes[:at]) for at in range(len(sizes)))

    @property
    def members(self) -> tuple[tuple[str, Construct, str], ...]:
        """Name, brick and meaning of every field, in file order."""
        return self._fields

    def rows(self) -> list[Row]:
        """The offset table of the spec. A field after one of variable size is placed relative to it."""
        rows: list[Row] = []
        anchor, constant, dims = "", 0, ""
        for name, brick, meaning in self._fields:
            offset = " + ".join(filter(None, [anchor, str(constant) if constant else "", dims])) or "0"
            fixed, variable = size_terms(brick)
            rows.append(Row(offset, variable or str(fixed), name, type_label(brick), meaning))
            constant += fixed
            if isinstance(brick, (Layout, Extension, Span)):
                anchor, constant, dims = f"end of `{name}`", 0, ""
            else:
                dims = " + ".join(filter(None, [dims, variable]))
        return rows


def _put_within(name: str, trace: list[FieldTrace], first: int) -> None:
    trace[first:] = [field._replace(path=f"{name}.{field.path}") for field in trace[first:]]


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
        return 0, f"{brick.itemsize}·{brick.count}"
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
        return f"u{8 * brick.itemsize} × {brick.count}"
    if isinstance(brick, Span):
        return "bytes"
    return {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[int(brick.sizeof())]


def offset_of_field(trace: list[FieldTrace], path: str) -> int | None:
    """Where a field begins in its blob. A shape of no dimensions has no bytes: it would begin behind its count."""
    for field in trace:
        if field.path == path:
            return field.offset
        if path.endswith("shape") and field.path == path.removesuffix("shape") + "ndim" and not field.value:
            return field.offset + field.size
    return None
