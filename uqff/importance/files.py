"""The files of importance matrices. All numbers are little endian.

::

    GGUF        general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; for each weight
                NAME.in_sum2   F32 [n, in]    sums of squares of its n matrices' inputs
                NAME.counts    F32 [n, 1]     tokens that went into them
    older form  i32 entries, then for each: i32 length, name, i32 calls, i32 values, f32 value ...
                i32 calls, i32 length, name of the text                                (may be absent)
                value = mean square · calls, calls = chunks of tokens; n matrices one after the other
    .cimatrix   u64 entries, then for each: u64 length, path of the module, u64 values, f32 value ...
                value = mean square (times the number of forward passes, which matters to nobody)

Authority: llama.cpp, ``tools/imatrix/imatrix.cpp`` (``save_imatrix``, ``save_imatrix_legacy``, ``load_imatrix``);
mistral.rs v0.9.2, ``mistralrs-quant/src/imatrix.rs`` (``CollectedImatrixData``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from uqff.container.atomic import atomic_file
from uqff.container.mapped import MappedBytes
from uqff.errors import FormatError, ShapeError, located
from uqff.gguf.reader import GgufFile, open_gguf
from uqff.gguf.schema import Array, Value, ValueType
from uqff.gguf.writer import PlannedTensor, write_gguf
from uqff.importance.matrix import Importance, InputSquares
from uqff.importance.names import entry_names, expert_of, module_name
from uqff.limits import MAX_GGUF_NAME, MAX_GGUF_TENSORS
from uqff.schema.bricks import Cursor, Violation

__all__ = ["WRITERS", "read_importance"]

Found = tuple[dict[str, InputSquares], int, list[str]]

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
F32: Final = 0
"""ggml's code."""
LEGACY_CHUNK: Final = 512
"""Tokens of a chunk where the file does not say it: llama.cpp's default."""


def read_importance(path: Path) -> Found:
    """Entries, tokens of a chunk, and names of texts; see :meth:`Importance.open`."""
    mapped = MappedBytes(path)
    try:
        if bytes(mapped.view[:4]) == b"GGUF":
            with open_gguf(path) as file, located(file=path):
                return _of_gguf(file)
        with located(file=path):
            cursor = Cursor(mapped.view)
            try:
                return _of_engine(cursor) if path.suffix == ".cimatrix" else _of_legacy(cursor)
            except Violation as error:
                raise FormatError(
                    f"no importance matrix: {error.problem}",
                    offset=cursor.tell(),
                    expected=error.expected,
                    got=error.got,
                ) from None
    finally:
        mapped.close()


def _of_gguf(file: GgufFile) -> Found:
    found: dict[str, InputSquares] = {}
    for name in file:
        if not name.endswith(SUMS):
            continue
        weight = name.removesuffix(SUMS)
        if f"{weight}{COUNTS}" not in file:
            raise FormatError("sums without counts", field=weight, expected=f"{weight}{COUNTS}")
        sums, counts = file[name], file[f"{weight}{COUNTS}"]
        for tensor in (sums, counts):
            if tensor.type_code != F32:
                raise FormatError("not float32", field=tensor.name, expected="F32", got=tensor.type_name)
        n = int(np.prod(counts.shape))
        if int(np.prod(sums.shape)) % n:
            raise ShapeError("sums and counts do not fit", field=weight, expected=f"{n} rows", got=list(sums.shape))
        numbers = counts.float32().reshape(-1)
        if not np.isfinite(numbers).all():
            raise FormatError("not a count", field=f"{weight}{COUNTS}")
        found[module_name(weight) or weight] = InputSquares(
            sums.float32().reshape(n, -1), np.rint(numbers).astype(np.int64)
        )
    if not found:
        raise FormatError("GGUF file holds no importance matrix", expected=f"tensors NAME{SUMS}", got="none")
    chunk = file.get_value(CHUNK, ValueType.U32)
    texts = file.get_value(DATASETS, ValueType.ARRAY)
    return found, chunk or LEGACY_CHUNK, texts.values() if texts is not None and texts.type is ValueType.TEXT else []


def _number(cursor: Cursor, code: str, what: str, most: int) -> int:
    number: int = struct.unpack(f"<{code}", cursor.read(struct.calcsize(f"<{code}")))[0]
    if not 0 <= number <= most:
        raise Violation(f"{what} out of range", expected=f"0 to {most}", got=number)
    return number


def _name(cursor: Cursor, code: str) -> str:
    raw = bytes(cursor.read(_number(cursor, code, "length of a name", MAX_GGUF_NAME)))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Violation("name is not Unicode", got=repr(raw)) from None


def _values(cursor: Cursor, code: str) -> npt.NDArray[np.float32]:
    count = _number(cursor, code, "number of values", cursor.remaining // 4)
    if not count:
        raise Violation("entry without values", expected="1 or more", got=0)
    return np.frombuffer(cursor.read(4 * count), "<f4").astype(np.float32)


def _put(found: dict[str, InputSquares], key: str, sums: npt.NDArray[np.float32], count: int) -> None:
    if key in found:
        raise FormatError("entry occurs twice", layer=key)
    with located(layer=key):
        found[key] = InputSquares(sums[None], np.array([count], np.int64))


def _of_legacy(cursor: Cursor) -> Found:
    found: dict[str, InputSquares] = {}
    for _ in range(_number(cursor, "i", "number of entries", MAX_GGUF_TENSORS)):
        name = _name(cursor, "i")
        calls = _number(cursor, "i", "number of calls", 2**31 - 1)
        _put(found, module_name(name) or name, _values(cursor, "i") * np.float32(LEGACY_CHUNK), calls * LEGACY_CHUNK)
    texts = []
    if cursor.remaining:
        _number(cursor, "i", "number of calls", 2**31 - 1)
        if cursor.remaining:
            texts.append(_name(cursor, "i"))
    return _whole(found, cursor), LEGACY_CHUNK, texts


def _of_engine(cursor: Cursor) -> Found:
    found: dict[str, InputSquares] = {}
    for _ in range(_number(cursor, "Q", "number of entries", MAX_GGUF_TENSORS)):
        name = _name(cursor, "Q")
        _put(found, name, _values(cursor, "Q"), 1)
    return _whole(found, cursor), LEGACY_CHUNK, []


def _whole(found: dict[str, InputSquares], cursor: Cursor) -> dict[str, InputSquares]:
    if cursor.remaining:
        raise Violation("bytes behind the last entry", expected=0, got=cursor.remaining)
    if not found:
        raise Violation("no entries", expected="1 or more", got=0)
    return found


def _by_entry(importance: Importance) -> list[tuple[str, InputSquares]]:
    """Sorted by llama.cpp's names; what it has no name for is called by its path, and of two of one name the latter."""
    named: dict[str, InputSquares] = {}
    for key in importance:
        names = entry_names(key) or (key if key.endswith(".weight") else f"{key}.weight",)
        squares = importance[key]
        if expert_of(key) is not None:
            if names[0] in named:
                continue
            squares = importance.stack(key)
        named |= dict.fromkeys(names, squares)
    return sorted(named.items())


def _write_gguf(importance: Importance, path: Path) -> None:
    chunks = max((int(each.counts.max()) for each in importance.values()), default=0) // importance.chunk
    pairs = [
        ("general.type", Value(ValueType.TEXT, "imatrix")),
        (DATASETS, Value(ValueType.ARRAY, Array.of(ValueType.TEXT, importance.datasets))),
        (CHUNKS, Value(ValueType.U32, chunks)),
        (CHUNK, Value(ValueType.U32, importance.chunk)),
    ]
    tensors = []
    for name, each in _by_entry(importance):
        tensors.append(_planned(f"{name}{SUMS}", each.sums))
        tensors.append(_planned(f"{name}{COUNTS}", each.counts.astype(np.float32)[:, None]))
    write_gguf(path, pairs, tensors)


def _planned(name: str, array: npt.NDArray[np.float32]) -> PlannedTensor:
    data = np.ascontiguousarray(array, "<f4")
    return PlannedTensor(name, data.shape, F32, data.nbytes, lambda: [data.data])


def _write_legacy(importance: Importance, path: Path) -> None:
    entries = [(name, each) for name, each in _by_entry(importance) if each.counts.any()]  # as llama.cpp does
    with atomic_file(path) as file:
        file.write(struct.pack("<i", len(entries)))
        most = 0
        for name, each in entries:
            raw = name.encode()
            calls = -(-int(each.counts.max()) // importance.chunk)
            most = max(most, calls)
            means = np.where(each.counts[:, None] == 0, np.float32(1), each.means)  # as llama.cpp does
            file.write(struct.pack(f"<i{len(raw)}sii", len(raw), raw, calls, means.size))
            file.write(np.ascontiguousarray(means * np.float32(calls), "<f4").data)
        text = (importance.datasets[-1] if importance.datasets else "").encode()[:MAX_GGUF_NAME]
        file.write(struct.pack(f"<ii{len(text)}s", most, len(text), text))


def _write_engine(importance: Importance, path: Path) -> None:
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(importance)))
        for key, each in importance.items():
            raw = (module_name(key) or key).encode()
            file.write(struct.pack(f"<Q{len(raw)}sQ", len(raw), raw, each.sums.size))
            file.write(np.ascontiguousarray(each.means, "<f4").data)


WRITERS: Final[Mapping[str, Callable[[Importance, Path], None]]] = {
    ".gguf": _write_gguf,
    ".imatrix": _write_legacy,
    ".dat": _write_legacy,
    ".cimatrix": _write_engine,
}
"""By the ending of the file's name."""
