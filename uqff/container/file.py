"""Opening a model: a mapping from layer key to layer over one or more mapped files.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs`` (``load_from_artifacts``, ``write_uqff``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uqff.blob import Layer, Sharding, deserialize, read_fields
from uqff.codes import Version
from uqff.container.framing import LENGTH_BYTES, Entry
from uqff.container.mapped import MappedFile, TensorMap
from uqff.container.shards import PathLike, resolve, shard_name
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError, printable
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope
from uqff.schema.header import HEADER

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["INDEX", "RESIDUAL_NAME", "Place", "UqffFile", "open_uqff"]

RESIDUAL_NAME = "residual.safetensors"
INDEX = re.compile(r"[0-9]{1,9}")
"""The text of a layer index. Bounded: no model has 10**9 layers, and a number of any length would be slow to read."""
_V1_KEYS = ("uqff.version.major", ".weight.format")


class Place(NamedTuple):
    """Where a blob lies: file, offset from the start of the file, length."""

    path: Path
    offset: int
    nbytes: int


class UqffFile(Mapping[str, Layer]):
    """An open model: layer keys to layers, in the order of the layer index. Made by :func:`uqff.open`.

    Keys are the texts in the file (``"0"``, ``"1"``, ...); an ``int`` finds the layer of that index.  Layers are made
    when asked for, as views of the mapped file; they stay valid after the file is closed.

    Attributes:
        paths: the shard files, in order.
        metadata: texts of the container's header; pre-1.0 writers store none.
    """

    def __init__(self, paths: list[Path], *, complete: bool = True) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._files: list[MappedFile] = []
        self._residual: list[MappedFile] = []
        self._layers: dict[str, tuple[MappedFile, Entry]] = {}
        self._by_index: dict[int, str] = {}
        try:
            for path in paths:
                self._add(MappedFile(path))
        except BaseException:
            self.close()
            raise
        if not complete and 0 not in self._by_index:
            self.close()
            raise ShardError(
                "gap in a set of shards",
                file=str(paths[0]),
                expected=f"its sibling {shard_name(paths[0].stem.rpartition('-')[0], 0)}",
                got="no such file (pass a list to open a shard alone)",
            )
        self._order = [self._by_index[index] for index in sorted(self._by_index)]

    def _add(self, file: MappedFile) -> None:
        self._files.append(file)
        self.metadata.update(file.header.metadata)
        for key in file.header.entries:
            if key == _V1_KEYS[0] or key.endswith(_V1_KEYS[1]):
                raise UnsupportedError(
                    "a UQFF 1.x file: this release handles 0.x", file=str(file.path), field=key, offset=LENGTH_BYTES
                )
        for key, entry in file.header.entries.items():
            self._check_entry(file, key, entry)
            index = int(key)
            if index in self._by_index:
                other = self._by_index[index]
                first = self._layers[other][0]
                error = FormatError if first is file else ShardError
                raise error(
                    "layer index occurs twice",
                    file=str(file.path),
                    layer=key,
                    offset=entry.begin,
                    got=f"also {other} in {first.path.name}",
                )
            self._by_index[index] = key
            self._layers[key] = (file, entry)

    @staticmethod
    def _check_entry(file: MappedFile, key: str, entry: Entry) -> None:
        if not INDEX.fullmatch(key):
            raise FormatError(
                "key is not a layer index",
                file=str(file.path),
                field=f"header.{key}",
                offset=LENGTH_BYTES,
                expected="a decimal number",
                got=key,
            )
        if entry.dtype != "U8" or len(entry.shape) != 1:
            raise FormatError(
                "blob is not a row of bytes",
                file=str(file.path),
                layer=key,
                offset=entry.begin,
                expected="U8 [n]",
                got=f"{entry.dtype} {list(entry.shape)}",
            )

    def _name(self, key: object) -> str | None:
        if isinstance(key, int) and not isinstance(key, bool):
            return self._by_index.get(key)
        return key if isinstance(key, str) and key in self._layers else None

    def _find(self, key: str | int) -> tuple[str, MappedFile, Entry]:
        name = self._name(key)
        if name is None:
            raise KeyError(key)
        return (name, *self._layers[name])

    def __getitem__(self, key: str | int) -> Layer:
        """The layer of a key or index.

        Raises:
            KeyError: no such layer.
            UqffError: the blob is not valid; file, layer, field and offset in the file are named.
        """
        name, file, entry = self._find(key)
        try:
            return deserialize(file.slice(entry))
        except UqffError as error:
            raise error.within(file=str(file.path), layer=name, base=entry.begin) from None

    def layer(self, key: str | int, shard: Sharding | None = None) -> Layer:
        """The layer of a key or index, or the slice of it that a :class:`~uqff.parallel.Shard` names.

        Only the bytes of the slice are read: a slice of the outputs is a view of the file, one of the inputs a copy of
        its part of every row.  The bias of a slice of the inputs is the whole bias, to be added to the reduced sum.

        Raises:
            KeyError: no such layer.
            ShardError: the slice cannot be cut.
            UqffError: the blob is not valid.
        """
        whole = self[key]
        if shard is None:
            return whole
        name, file, _ = self._find(key)
        try:
            return shard.apply_to(whole)
        except UqffError as error:
            raise error.within(file=str(file.path), layer=name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return self._name(key) is not None

    def blob(self, key: str | int) -> memoryview:
        """The bytes of a layer's blob, as they are in the file."""
        _, file, entry = self._find(key)
        return file.slice(entry)

    def place(self, key: str | int) -> Place:
        """Where a layer's blob lies."""
        _, file, entry = self._find(key)
        return Place(file.path, entry.begin, entry.end - entry.begin)

    def fields(self, key: str | int, *, trace: list[FieldTrace] | None = None) -> tuple[type[QuantizedTensor], Scope]:
        """The parsed and validated fields of a layer's blob, without its tensors; does not import torch."""
        name, file, entry = self._find(key)
        try:
            return read_fields(file.slice(entry), trace=trace)
        except UqffError as error:
            raise error.within(file=str(file.path), layer=name, base=entry.begin) from None

    @cached_property
    def version(self) -> Version:
        """The highest version among the blobs (a file usually has one).

        Raises:
            UqffError: a blob has no readable header.
        """
        return max((self._blob_version(key) for key in self), default=Version(0, 1, 0))

    def _blob_version(self, key: str) -> Version:
        name, file, entry = self._find(key)
        try:
            version: Version = HEADER.read(file.slice(entry)[: HEADER.fixed_size], exact=False)["version"]
        except UqffError as error:
            raise error.within(file=str(file.path), layer=name, base=entry.begin) from None
        return version

    @cached_property
    def residual(self) -> TensorMap:
        """The tensors that are not quantised, from ``residual.safetensors`` beside the file; empty if there is none."""
        path = self.paths[0].parent / RESIDUAL_NAME
        if path.is_file():
            self._residual.append(MappedFile(path))
        return TensorMap(self._residual)

    def close(self) -> None:
        """Release the files. Layers and tensors already taken out stay valid."""
        for file in (*self._files, *self._residual):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(printable(path.name) for path in self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"<UqffFile {names}: {len(self)} layers>"


def open_uqff(path: PathLike | Sequence[PathLike]) -> UqffFile:
    """Open a model for reading.

    Args:
        path: a ``.uqff`` file, one shard of a set (siblings ``<stem>-N.uqff`` are found), a list of shards, or a model
            directory.

    Returns:
        A context manager and mapping; only headers have been read.

    Raises:
        UqffError: the container breaks a rule, the set has a gap, or the file is something else.
        OSError: the file cannot be read.
    """
    paths, complete = resolve(path)
    return UqffFile(paths, complete=complete)
