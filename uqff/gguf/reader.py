"""A GGUF file, or the set of files of a split one: metadata and tensors, mapped.

Versions 2 and 3, little endian.  Every count and length is compared with the file's size before anything is made of
it; metadata arrays stay bytes until somebody asks for their values; tensors are views of the mapped file.  Tensors of
ggml types that are not read (:data:`uqff.gguf.types.UNREAD_TYPES`) are listed, but their bytes cannot be taken.

Split files are called ``<stem>-00001-of-0000N.gguf``; any of them stands for the whole set.  The metadata is that of
the first.

Authority: ggml, ``docs/gguf.md``, ``src/gguf.cpp``; llama.cpp, ``src/llama-model-loader.cpp`` (splits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.container.closing import Closing
from uqff.container.framing import Header, TensorEntry
from uqff.container.mapped import ListedFile, MappedBytes
from uqff.container.shards import PathLike
from uqff.errors import FormatError, ShapeError, ShardError, UnsupportedError, UqffError, located
from uqff.families.gguf.blocks import BlockType, block_type_of_code
from uqff.families.gguf.tensor import GGUF
from uqff.families.part import Part
from uqff.gguf.dequantize import dequantized
from uqff.gguf.schema import (
    ALIGNMENT_KEY,
    TensorInfo,
    Value,
    ValueType,
    aligned,
    checked_alignment,
    read_head,
    read_pair,
    read_tensor,
)
from uqff.gguf.types import ggml_type, type_name
from uqff.hub.names import GGUF_PART
from uqff.limits import MAX_SHARDS
from uqff.schema.bricks import Cursor

__all__ = ["GgufFile", "GgufTensor", "head_end", "open_gguf"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the list.

    Attributes:
        name: of the tensor.
        shape: in elements, outermost first.
        type_code: its ggml type.
        begin: byte offset from the start of its file.
        file: where it lies.
    """

    name: str
    shape: tuple[int, ...]
    type_code: int
    begin: int
    file: MappedBytes

    @property
    def block_type(self) -> BlockType | None:
        """Its type, None if UQFF has no such type."""
        return block_type_of_code(self.type_code)

    @property
    def ggml_type(self) -> BlockType | None:
        """Its type, UQFF's or a foreign one; None if it is not read."""
        return ggml_type(self.type_code)

    @property
    def type_name(self) -> str:
        """Its type as UQFF or else ggml spells it."""
        return type_name(self.type_code)

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks; of a type that is not read, 0."""
        block_type = self.ggml_type
        return 0 if block_type is None else math.prod(self.shape) // block_type.block_size * block_type.type_size

    def record(self) -> GGUF:
        """Its blocks, as a view of the file.

        Raises:
            UnsupportedError: UQFF has no such type.
            ShapeError: it has no dimensions.
        """
        block_type = self.block_type
        if block_type is None:
            raise self._unknown("type that UQFF does not have")
        return GGUF.made_of(data=self.blocks(), block_type=block_type)

    def blocks(self) -> Part:
        """The bytes of its blocks, U8 ``[..., bytes of a row]``, as a view of the file.

        Raises:
            UnsupportedError: a type that is not read.
            ShapeError: it has no dimensions.
        """
        block_type = self.ggml_type
        if block_type is None:
            raise self._unknown("type that is not read")
        if not self.shape:
            raise ShapeError("tensor without dimensions", field=self.name, expected="at least 1", got=0)
        *outer, last = self.shape
        row = last // block_type.block_size * block_type.type_size
        return Part(DType.U8, (*outer, row), self.file.bytes_between(self.begin, self.begin + self.nbytes))

    def float32(self) -> npt.NDArray[np.float32]:
        """Its numbers, in new memory; raises what :meth:`blocks` does."""
        if self.block_type is None:
            blocks, foreign = self.blocks(), self.ggml_type
            assert foreign is not None
            return dequantized(foreign, blocks.array()).reshape(self.shape)
        return self.record().numbers().array().view(np.float32).reshape(self.shape)

    def _unknown(self, problem: str) -> UnsupportedError:
        file = str(self.file.path)
        return UnsupportedError(problem, file=file, field=self.name, offset=self.begin, got=self.type_name)

    def release(self) -> None:
        """Give back the memory of its bytes; a later look reads them again."""
        self.file.advise(self.begin, self.begin + self.nbytes, "DONTNEED")


class GgufFile(Mapping[str, GgufTensor], Closing):
    """An open GGUF file: tensor names to tensors. Made by :func:`open_gguf`.

    Attributes:
        paths: its files.
        version: of the format, 2 or 3.
        pairs: the metadata as it is stored, with types.
    """

    def __init__(self, parts: list[_SplitFile]) -> None:
        self.paths = tuple(part.file.path for part in parts)
        self.version = parts[0].version
        self.pairs = parts[0].pairs
        self._files = [part.file for part in parts]
        self._tensors: dict[str, GgufTensor] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self._tensors:
                    other = self._tensors[name].file.path.name
                    raise ShardError(
                        "tensor occurs in two files", file=str(part.file.path), field=name, got=f"also in {other}"
                    )
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> GgufTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def get_value(self, key: str, *types: ValueType) -> Any:
        """A metadata value, None if there is none.

        Args:
            key: of the value.
            types: that it may have; any if none is given.

        Raises:
            FormatError: it has another type.
        """
        value = self.pairs.get(key)
        if value is None:
            return None
        if types and value.type not in types:
            raise FormatError(
                "metadata has another type",
                file=str(self.paths[0]),
                field=key,
                expected=" or ".join(type.name.lower() for type in types),
                got=value.type.name.lower(),
            )
        return value.value

    def listed(self) -> tuple[ListedFile, ...]:
        """The files with what lies in each."""
        entries: list[dict[str, TensorEntry]] = [{} for _ in self._files]
        for tensor in self._tensors.values():
            place = tensor.begin, tensor.begin + tensor.nbytes
            found = TensorEntry(tensor.name, tensor.type_name, tensor.shape, *place)
            entries[self._files.index(tensor.file)][tensor.name] = found
        made = []
        for file, each in zip(self._files, entries, strict=True):
            begin = min((entry.begin for entry in each.values()), default=len(file.view))
            made.append(ListedFile(file.view, Header(each, {}, begin)))
        return tuple(made)

    def close(self) -> None:
        """Release the files. Tensors already taken out stay valid."""
        for file in self._files:
            file.close()

    def __repr__(self) -> str:
        return f"<GgufFile {self.paths[0]}: {len(self)} tensors>"


class _SplitFile:
    """One file of a set."""

    def __init__(self, path: Path) -> None:
        self.file = MappedBytes(path)
        try:
            with located(file=path):
                self._parse()
        except UqffError as error:
            self.file.close()
            error.rule = None  # what is read with UQFF's bricks breaks no rule of UQFF
            raise

    def _parse(self) -> None:
        cursor = Cursor(self.file.view)
        self.version, tensor_count, pair_count = read_head(cursor)
        self.pairs: dict[str, Value] = {}
        starts: dict[str, int] = {}
        for _ in range(pair_count):
            start = cursor.tell()
            key, value = read_pair(cursor)
            if key in self.pairs:
                raise FormatError("key occurs twice", field=key, offset=start)
            self.pairs[key], starts[key] = value, start
        try:
            alignment = checked_alignment(self.pairs.get(ALIGNMENT_KEY))
        except UqffError as error:
            error.offset = starts[ALIGNMENT_KEY]
            raise
        infos: dict[str, tuple[TensorInfo, int]] = {}
        for _ in range(tensor_count):
            start = cursor.tell()
            info = read_tensor(cursor)
            if info.name in infos:
                raise FormatError("tensor occurs twice", field=info.name, offset=start)
            infos[info.name] = info, start
        data_begin = aligned(cursor.tell(), alignment)
        self.tensors = {name: self._placed(info, start, data_begin, alignment) for name, (info, start) in infos.items()}
        _check_overlap(self.tensors)

    def _placed(self, info: TensorInfo, start: int, data_begin: int, alignment: int) -> GgufTensor:
        """The tensor where its bytes are; ``start`` is where the list speaks of it."""
        if info.offset % alignment:
            raise FormatError(
                "tensor is not aligned",
                field=f"{info.name}.offset",
                offset=start,
                expected=f"a multiple of {alignment}",
                got=info.offset,
            )
        tensor = GgufTensor(info.name, info.shape, info.type, data_begin + info.offset, self.file)
        block_type = tensor.ggml_type
        if block_type is not None and (info.shape or (1,))[-1] % block_type.block_size:
            raise FormatError(
                "row is not whole blocks",
                field=f"{info.name}.shape",
                offset=start,
                expected=f"a row of {block_type.name} in multiples of {block_type.block_size}",
                got=info.shape[-1] if info.shape else "no dimensions",
            )
        if tensor.begin + tensor.nbytes > len(self.file.view):
            raise FormatError(
                "tensor runs past the end of the file",
                field=f"{info.name}.offset",
                offset=start,
                expected=f"an end of at most {len(self.file.view)}",
                got=tensor.begin + tensor.nbytes,
            )
        return tensor


def head_end(data: memoryview) -> int:
    """Where the list of tensors ends in a file of which only the beginning is there.

    Raises:
        UqffError: it ends elsewhere; or what there is of it breaks a rule.
    """
    cursor = Cursor(data)
    _, tensor_count, pair_count = read_head(cursor)
    for _ in range(pair_count):
        read_pair(cursor)
    for _ in range(tensor_count):
        read_tensor(cursor)
    return cursor.tell()


def _check_overlap(tensors: Mapping[str, GgufTensor]) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if tensor.nbytes and tensor.begin < end:
            raise FormatError("tensors overlap", field=tensor.name, offset=tensor.begin, got=f"also part of {last}")
        if tensor.nbytes:
            end, last = tensor.begin + tensor.nbytes, tensor.name


def open_gguf(path: PathLike) -> GgufFile:
    """Open a GGUF file for reading.

    Args:
        path: a file, or one of a split set, whose siblings are found.

    Raises:
        FormatError: the file breaks a rule; ``field`` and ``offset`` say where.
        UnsupportedError: another version, a big-endian file, an array of arrays.
        ShardError: the files of a split set do not belong together.
        OSError: it cannot be read.
    """
    path = Path(path)
    match = GGUF_PART.fullmatch(path.name)
    paths = [path] if match is None else _siblings(path, match["stem"], int(match["count"]))
    parts: list[_SplitFile] = []
    try:
        for each in paths:
            parts.append(_SplitFile(each))
        if match is not None:
            _check_split(parts)
        else:
            _check_whole(parts[0])
        return GgufFile(parts)
    except BaseException:
        for part in parts:
            part.file.close()
        raise


def _siblings(path: Path, stem: str, count: int) -> list[Path]:
    if not 1 <= count <= MAX_SHARDS:
        raise ShardError("senseless number of files", file=str(path), expected=f"1 to {MAX_SHARDS}", got=count)
    for number in range(1, count + 1):
        sibling = path.parent / f"{stem}-{number:05}-of-{count:05}.gguf"
        if not sibling.is_file():
            raise ShardError("gap in a split file", file=str(path), expected=sibling.name, got="no such file")
    return [path.parent / f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _check_split(parts: list[_SplitFile]) -> None:
    """Each file says which it is, how many there are, and how many tensors there are in all."""
    total = sum(len(part.tensors) for part in parts)
    for number, part in enumerate(parts):
        claims = {"split.no": number, "split.count": len(parts), "split.tensors.count": total}
        for key, expected in claims.items():
            value = part.pairs.get(key)
            if value is None or value.value != expected:
                raise ShardError(
                    "files of a split set do not belong together",
                    file=str(part.file.path),
                    field=key,
                    expected=expected,
                    got="none" if value is None else value.value,
                )


def _check_whole(part: _SplitFile) -> None:
    """A file that is called like none of a set is none."""
    value = part.pairs.get("split.count")
    if value is not None and value.value not in (0, 1):
        raise ShardError(
            "file of a split set without its number",
            file=str(part.file.path),
            field="split.count",
            expected="a name that ends in -00001-of-00002.gguf or the like",
            got=f"{part.file.path.name}, one of {value.value}",
        )
