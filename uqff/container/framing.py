"""The safetensors framing, parsed with bounds and built byte for byte like the reference implementation.

::

    u64 n | n bytes of JSON, padded with spaces | data

    JSON: {"__metadata__": {text: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}

Rules, each with its reason: the header is bounded (it is parsed whole); keys are unique (two readers must not see two
files); every tensor's size follows from dtype and shape; the tensors tile the data from byte 0 to the last one, without
overlap and without hole (nothing can hide in a file).

Authority: safetensors, ``safetensors/src/tensor.rs`` (``Metadata::validate``, ``prepare``) and its README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from uqff.bounded_json import check_values, check_width
from uqff.container.foreign import identify
from uqff.errors import FormatError, UnsupportedError
from uqff.limits import MAX_ELEMENTS, MAX_HEADER_BYTES, MAX_NAME, MAX_RANK

__all__ = ["DTYPE_BITS", "Header", "TensorEntry", "build_header", "parse_header"]

LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every safetensors dtype, in the order in which writers sort tensors (ascending alignment)."""


class TensorEntry(NamedTuple):
    """One tensor of a file; ``begin`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A parsed header: entries in the order of their bytes, metadata, and where the data begins."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_begin: int


def parse_header(view: memoryview) -> Header:
    """Parse and check the header of a safetensors file.

    Args:
        view: the whole file; only the header is read.

    Raises:
        FormatError: with ``field`` and, where it helps, ``offset`` in the file.
        UnsupportedError: a dtype that this library does not know.
    """
    if len(view) < LENGTH_BYTES:
        raise _explained(
            view, "FILE-01", "file is too short", "header length", 0, f"at least {LENGTH_BYTES} bytes", len(view)
        )
    length = int.from_bytes(view[:LENGTH_BYTES], "little")
    room = len(view) - LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise _explained(
            view, "FILE-02", "header is too long", "header length", 0, f"at most {MAX_HEADER_BYTES}", length
        )
    if length > room:
        raise _explained(
            view, "FILE-03", "header runs past the end of the file", "header length", 0, f"at most {room}", length
        )
    raw = bytes(view[LENGTH_BYTES : LENGTH_BYTES + length])
    if not raw.startswith(b"{"):
        raise _explained(view, "FILE-04", "header is not a JSON object", "header", LENGTH_BYTES, "'{'", repr(raw[:1]))
    check_values(raw, field="header", offset=LENGTH_BYTES, rule="FILE-05")
    check_width(raw, field="header", offset=LENGTH_BYTES)
    fields = _load_json(raw)
    data_begin = LENGTH_BYTES + length
    metadata = _parse_metadata(fields.pop(METADATA_KEY, {}))
    if b"\\u" in raw:
        _check_texts([*fields, *metadata, *metadata.values()])
    entries = [_parse_entry(name, fields[name], data_begin) for name in fields]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_tiling(entries, data_begin, len(view))
    return Header({entry.name: entry for entry in entries}, metadata, data_begin)


def _explained(
    view: memoryview, rule: str, problem: str, field: str, offset: int, expected: object, got: object
) -> FormatError:
    foreign = identify(bytes(view[:512]))
    if foreign:
        return FormatError(f"not a UQFF file: {foreign}", offset=0, rule="FILE-16")
    return FormatError(problem, field=field, offset=offset, expected=expected, got=got, rule=rule)


def _load_json(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            _check_name(name)
            if name in table:
                raise FormatError("key occurs twice", rule="FILE-06", field=f"header.{name}", offset=LENGTH_BYTES)
            table[name] = value
        return table

    def natural(digits: str) -> int:
        if len(digits) > 19 or digits.startswith("-"):
            raise FormatError(
                "number out of range",
                rule="FILE-07",
                field="header",
                offset=LENGTH_BYTES,
                expected="0 to 2**63 - 1",
                got=_short(digits),
            )
        return int(digits)

    def refuse(constant: str) -> Any:
        raise FormatError("not a JSON number", rule="FILE-04", field="header", offset=LENGTH_BYTES, got=constant)

    try:
        text = raw.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=unique, parse_int=natural, parse_constant=refuse)
    except UnicodeDecodeError as exc:
        at = LENGTH_BYTES + exc.start
        raise FormatError("header is not UTF-8", rule="FILE-04", field="header", offset=at, got=exc.reason) from exc
    except (ValueError, RecursionError) as exc:
        at = LENGTH_BYTES + (exc.pos if isinstance(exc, json.JSONDecodeError) else 0)
        raise FormatError("header is not JSON", rule="FILE-04", field="header", offset=at, got=str(exc)) from exc
    if not isinstance(fields, dict):
        raise FormatError("header is not a JSON object", rule="FILE-04", field="header", offset=LENGTH_BYTES)
    return fields


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise FormatError(
            "name is too long",
            field="header",
            offset=LENGTH_BYTES,
            expected=f"at most {MAX_NAME} characters",
            got=len(name),
        )


def _check_texts(texts: Iterable[str]) -> None:
    """Refuse escapes that name half a character: such a text could neither be printed nor written again."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as exc:
        got = exc.object[exc.start]
        raise FormatError("text is not Unicode", rule="FILE-08", field="header", offset=LENGTH_BYTES, got=got) from exc


def _parse_metadata(metadata: Any) -> dict[str, str]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return metadata
    raise FormatError("metadata is not a map of texts", rule="FILE-09", field=METADATA_KEY, offset=LENGTH_BYTES)


def _naturals(value: Any, field: str, most: int, rule: str) -> list[int]:
    """A list of at most ``most`` non-negative integers below 2**63 (bool is not one)."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise FormatError(
            "not a list of non-negative integers", rule=rule, field=field, offset=LENGTH_BYTES, got=_short(value)
        )
    if len(value) > most:
        raise FormatError(
            "list is too long", rule=rule, field=field, offset=LENGTH_BYTES, expected=f"at most {most}", got=len(value)
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parse_entry(name: str, fields: Any, data_begin: int) -> TensorEntry:
    where = f"header.{name}"
    if not isinstance(fields, dict) or set(fields) != _ENTRY_KEYS:
        got = sorted(fields) if isinstance(fields, dict) else _short(fields)
        raise FormatError(
            "malformed entry", rule="FILE-10", field=where, offset=LENGTH_BYTES, expected=sorted(_ENTRY_KEYS), got=got
        )
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        error = UnsupportedError if isinstance(dtype, str) else FormatError
        raise error("unknown dtype", rule="FILE-11", field=f"{where}.dtype", offset=LENGTH_BYTES, got=_short(dtype))
    shape = tuple(_naturals(fields["shape"], f"{where}.shape", MAX_RANK, "FILE-12"))
    offsets = _naturals(fields["data_offsets"], f"{where}.data_offsets", 2, "FILE-13")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            "malformed offsets",
            rule="FILE-13",
            field=f"{where}.data_offsets",
            offset=LENGTH_BYTES,
            expected="[begin, end]",
            got=offsets,
        )
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise FormatError(
            "size does not fit dtype and shape",
            rule="FILE-14",
            field=f"{where}.data_offsets",
            offset=LENGTH_BYTES,
            expected=f"{-(-bits // 8)} bytes",
            got=end - begin,
        )
    if math.prod(filter(None, shape)) >= MAX_ELEMENTS:
        raise FormatError(
            "shape is too large",
            rule="FILE-14",
            field=f"{where}.shape",
            offset=LENGTH_BYTES,
            expected=f"a product below {MAX_ELEMENTS}, zeros left out",
            got=list(shape),
        )
    return TensorEntry(name, dtype, shape, data_begin + begin, data_begin + end)


def _check_tiling(entries: list[TensorEntry], data_begin: int, file_end: int) -> None:
    at = data_begin
    for entry in entries:
        if entry.begin != at:
            problem = "tensors overlap" if entry.begin < at else "hole between tensors"
            raise FormatError(
                problem,
                rule="FILE-15",
                field=f"header.{entry.name}.data_offsets",
                offset=LENGTH_BYTES,
                expected=f"begin {at - data_begin}",
                got=entry.begin - data_begin,
            )
        at = entry.end
    if at > file_end:
        last = entries[-1].name
        raise FormatError(
            "truncated",
            rule="FILE-15",
            field=f"header.{last}.data_offsets",
            offset=LENGTH_BYTES,
            expected=f"a file of {at} bytes",
            got=file_end,
        )
    if at < file_end:
        raise FormatError("trailing bytes", rule="FILE-15", offset=at, expected=f"a file of {at} bytes", got=file_end)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The header of a file, and the order in which the data must follow.

    Args:
        tensors: name, safetensors dtype and shape of each tensor, in any order.
        metadata: texts to store; no ``__metadata__`` is written if None.

    Returns:
        The bytes before the data (length, JSON, padding to a multiple of 8), and the names in file order: wider dtypes
        first, then by name as UTF-8 bytes.

    Raises:
        FormatError: a name is longer than a reader takes.
    """
    rank = {dtype: at for at, dtype in enumerate(DTYPE_BITS)}
    ordered = sorted(tensors, key=lambda t: (-rank[t[1]], t[0].encode("utf-8")))
    fields: dict[str, Any] = {} if metadata is None else {METADATA_KEY: dict(metadata)}
    at = 0
    for name in (*(metadata or ()), *(name for name, _, _ in ordered)):
        _check_name(name)
    for name, dtype, shape in ordered:
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, [name for name, _, _ in ordered]
