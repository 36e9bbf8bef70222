"""The layers of pre-1.0 files: one row of bytes per layer, its key a number.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs`` (``load_from_artifacts``, ``write_uqff``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from uqff.codec.blob import deserialize, read_fields
from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.framing import LENGTH_BYTES, TensorEntry
from uqff.container.index import HeldEntry, LayerIndex, Place
from uqff.container.mapped import MappedFile
from uqff.container.shards import shard_name
from uqff.errors import FormatError, ShardError, located
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope
from uqff.schema.header import HEADER

__all__ = ["INDEX", "BlobIndex"]

INDEX = re.compile(r"[0-9]{1,9}")
"""The text of a layer index. Bounded: no model has 10**9 layers, and a number of any length would be slow to read."""


class BlobIndex(LayerIndex):
    """Layer indices and keys to blobs."""

    generation = "0.x"

    def __init__(self, files: Sequence[MappedFile], *, complete: bool) -> None:
        self._layers: dict[str, HeldEntry] = {}
        self._by_index: dict[int, str] = {}
        for file in files:
            _check_kind(file)
            for key, entry in file.header.entries.items():
                self._add(key, HeldEntry(file, entry))
        if not complete and 0 not in self._by_index:
            path = files[0].path
            raise ShardError(
                "gap in a set of shards",
                rule="FILE-17",
                file=str(path),
                expected=f"its sibling {shard_name(path.stem.rpartition('-')[0], 0)}",
                got="no such file (pass a list to open a shard alone)",
            )
        self.keys = [self._by_index[index] for index in sorted(self._by_index)]
        self.extra: dict[str, HeldEntry] = {}

    def _add(self, key: str, held: HeldEntry) -> None:
        file, entry = held
        _check_entry(file, key, entry)
        index = int(key)
        if index in self._by_index:
            other = self._by_index[index]
            first = self._layers[other].file
            error = FormatError if first is file else ShardError
            raise error(
                "layer index occurs twice",
                rule="FILE-19",
                file=str(file.path),
                layer=key,
                offset=entry.begin,
                got=f"also {other} in {first.path.name}",
            )
        self._by_index[index] = key
        self._layers[key] = held

    def name(self, key: object) -> str | None:
        """The key of a layer given by key or index; None if there is none."""
        if isinstance(key, int) and not isinstance(key, bool):
            return self._by_index.get(key)
        return key if isinstance(key, str) and key in self._layers else None

    def layer(self, name: str) -> Layer:
        """The layer of a key."""
        with self._located(name):
            return deserialize(self._layers[name].view)

    def blob(self, name: str) -> memoryview:
        """The bytes of a layer."""
        return self._layers[name].view

    def place(self, name: str) -> Place:
        """Where they lie."""
        return self._layers[name].place

    def places(self, name: str) -> dict[str, Place]:
        """The one place of a layer, under an empty suffix."""
        return {"": self.place(name)}

    def fields(self, name: str, trace: list[FieldTrace] | None) -> tuple[type[QuantizedTensor], Scope]:
        """The fields of a blob; offsets in the trace count from its start."""
        with self._located(name):
            return read_fields(self._layers[name].view, trace=trace)

    @cached_property
    def version(self) -> Version:
        """The highest version among the blobs."""
        return max(map(self._blob_version, self.keys), default=Version(0, 1, 0))

    def _blob_version(self, name: str) -> Version:
        with self._located(name):
            version: Version = HEADER.read(self._layers[name].view[: HEADER.fixed_size], exact=False)["version"]
            return version

    def _located(self, name: str) -> AbstractContextManager[None]:
        file, entry = self._layers[name]
        return located(file=file.path, layer=name, base=entry.begin)


def _check_kind(file: MappedFile) -> None:
    """Name a checkpoint, or the residual of a model, as what it is: the first of its keys would say little."""
    names = file.header.entries
    if any(name.endswith(".weight") for name in names) and not any(map(INDEX.fullmatch, names)):
        raise FormatError(
            "not a UQFF file: a safetensors file of plain tensors",
            rule="FILE-16",
            file=str(file.path),
            offset=LENGTH_BYTES,
            expected="layer indices as keys, or entries of 1.x",
            got=next(name for name in names if name.endswith(".weight")),
        )


def _check_entry(file: MappedFile, key: str, entry: TensorEntry) -> None:
    if not INDEX.fullmatch(key):
        raise FormatError(
            "key is not a layer index",
            rule="FILE-18",
            file=str(file.path),
            field=f"header.{key}",
            offset=LENGTH_BYTES,
            expected="a decimal number",
            got=key,
        )
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise FormatError(
            "blob is not a row of bytes",
            rule="FILE-20",
            file=str(file.path),
            layer=key,
            offset=entry.begin,
            expected="U8 [n]",
            got=f"{entry.dtype} {list(entry.shape)}",
        )
