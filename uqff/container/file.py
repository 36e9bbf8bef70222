"""Opening a model: a mapping from layer key to layer over one or more mapped files, of either generation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from uqff.codec.layer import Layer, Sharding
from uqff.codes import Version
from uqff.container.closing import Closing
from uqff.container.document import is_present
from uqff.container.index import LayerIndex, Place
from uqff.container.mapped import MappedFile, TensorMap
from uqff.container.shards import PathLike, are_in_force, resolve
from uqff.container.v0 import INDEX, BlobIndex
from uqff.container.v1 import EntryIndex, is_entry_file
from uqff.errors import MissingError, ShardError, located, printable
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope
from uqff.schema.entries import RawTensor

__all__ = ["INDEX", "RESIDUAL_NAME", "Place", "UqffFile", "open_uqff"]

RESIDUAL_NAME = "residual.safetensors"

ATTEMPTS = 10
"""How often a set of shards is opened that others replace meanwhile."""


class UqffFile(Mapping[str, Layer], Closing):
    """An open model: layer keys to layers. Made by :func:`uqff.open`.

    Keys of a 0.x file are numbers (``"0"``, ``"1"``, ...), in their order; an ``int`` finds the layer of that index.
    Keys of a 1.x file are paths of weights (``"lm_head"``, ``"model.layers.0.mlp.up_proj"``, ...), sorted as texts; an
    ``int`` finds the layer of that place, counted from 0.
    Layers are made when asked for, as views of the mapped file; they stay valid after the file is closed.

    Attributes:
        paths: the shard files, in order.
        metadata: texts of the containers' headers; writers before 1.1 store none.
    """

    def __init__(self, paths: list[Path], *, complete: bool = True) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._files: list[MappedFile] = []
        self._residual: list[MappedFile] = []
        try:
            for path in paths:
                self._files.append(MappedFile(path))
                self.metadata.update(self._files[-1].header.metadata)
            kind = EntryIndex if any(map(is_entry_file, self._files)) else BlobIndex
            self._index: LayerIndex = kind(self._files, complete=complete)
        except BaseException:
            self.close()
            raise

    def find(self, key: str | int) -> str | None:
        """The key of a layer given by key or index; None if there is none."""
        return self._index.name(key)

    def key(self, key: str | int) -> str:
        """The key of a layer given by key or index.

        Raises:
            MissingError: no such layer.
        """
        name = self.find(key)
        if name is None:
            raise MissingError(
                "no such layer", file=str(self.paths[0]), expected=f"one of {len(self)}, as listed by keys()", got=key
            )
        return name

    def __getitem__(self, key: str | int) -> Layer:
        """The layer of a key or an index.

        Raises:
            MissingError: no such layer.
            UqffError: the layer is not valid; file, layer, field and offset in the file are named.
        """
        return self._index.layer(self.key(key))

    def layer(self, key: str | int, shard: Sharding | None = None) -> Layer:
        """The layer of a key or index, or the slice of it that a :class:`~uqff.parallel.Shard` names.

        Only the bytes of the slice are read: a slice of the outputs is a view of the file, one of the inputs a copy of
        its part of every row.  The bias of a slice of the inputs is the whole bias, to be added to the reduced sum.

        Raises:
            MissingError: no such layer.
            ShardError: the slice cannot be cut.
            UqffError: the layer is not valid.
        """
        whole = self[key]
        if shard is None:
            return whole
        with located(file=self.place(key).path, layer=self.key(key)):
            return shard.apply_to(whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.keys)

    def __len__(self) -> int:
        return len(self._index.keys)

    def __contains__(self, key: object) -> bool:
        return self._index.name(key) is not None

    @property
    def generation(self) -> str:
        """``0.x`` (blobs by number) or ``1.x`` (entries by weight path)."""
        return self._index.generation

    @property
    def version(self) -> Version:
        """The version of a 1.x file; of a 0.x file, the highest version among the blobs (there usually is one).

        Raises:
            UqffError: a blob has no readable header.
        """
        return self._index.version

    def blob(self, key: str | int) -> memoryview:
        """The bytes of a layer's blob, as they are in a 0.x file.

        Raises:
            UnsupportedError: 1.x layers have no blob.
        """
        return self._index.blob(self.key(key))

    def entries(self, key: str | int) -> dict[str, RawTensor]:
        """The entries of a 1.x layer by suffix (``weight.format``, ``weight``, ...), as they are in the file.

        Raises:
            UnsupportedError: 0.x layers have no entries.
        """
        return self._index.entries(self.key(key))

    def place(self, key: str | int) -> Place:
        """Where a layer's blob lies; in 1.x, its entry ``weight``."""
        return self._index.place(self.key(key))

    def places(self, key: str | int) -> dict[str, Place]:
        """Where each entry of a 1.x layer lies, by suffix; the blob of a 0.x layer stands under ``""``."""
        return self._index.places(self.key(key))

    def release(self, key: str | int) -> None:
        """Give back the memory of a layer's bytes; a later look reads them from the disk again."""
        files = {file.path: file for file in self._files}
        for place in self.places(key).values():
            files[place.path].advise(place.offset, place.offset + place.nbytes, "DONTNEED")

    def fields(self, key: str | int, *, trace: list[FieldTrace] | None = None) -> tuple[type[QuantizedTensor], Scope]:
        """The parsed and validated fields of a layer, without its tensors; does not import torch.

        Args:
            key: of a layer.
            trace: receives every field with its place: in 0.x from the start of the blob, under the field's name; in
                1.x from the start of the file that holds the entry, under the entry's suffix.
        """
        return self._index.fields(self.key(key), trace)

    @cached_property
    def extra(self) -> TensorMap:
        """The tensors of a 1.x file that belong to no layer: readers of the format ignore them."""
        return TensorMap.of(self._index.extra)

    @cached_property
    def residual(self) -> TensorMap:
        """The tensors that are not quantised, from ``residual.safetensors`` beside the file; empty if there is none."""
        path = self.paths[0].parent / RESIDUAL_NAME
        if is_present(path):
            self._residual.append(MappedFile(path))
        return TensorMap(self._residual)

    @property
    def mapped(self) -> tuple[MappedFile, ...]:
        """The files themselves: the shards, and the residual if there is one."""
        self.residual  # noqa: B018  # opens it
        return (*self._files, *self._residual)

    def close(self) -> None:
        """Release the files. Layers and tensors already taken out stay valid."""
        for file in (*self._files, *self._residual):
            file.close()

    def __repr__(self) -> str:
        names = ", ".join(printable(path.name) for path in self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"<UqffFile {names}: {len(self)} layers>"


def open_uqff(path: PathLike | Sequence[PathLike], isq: str | None = None) -> UqffFile:
    """Open a model for reading.

    Args:
        path: a ``.uqff`` file, one shard of a set (siblings ``<stem>-N.uqff`` are found), a list of shards, or a model
            directory; of a directory with several models, ``DIR:TYPE`` is one.
        isq: the type, if the path names none.

    Returns:
        A context manager and mapping; only headers have been read.

    Raises:
        UqffError: the container breaks a rule, the set has a gap, or the file is something else.
        OSError: the file cannot be read.

    >>> with uqff.open("model") as file:
    ...     weight, bias = file["model.layers.0.mlp.up_proj"]
    >>> weight.kind, weight.shape, bias
    ('q4k', (256, 256), None)
    """
    for _ in range(ATTEMPTS):
        paths, complete = resolve(path, isq)
        try:
            file = UqffFile(paths, complete=complete)
        except FileNotFoundError:
            if len(paths) == 1 or all(map(os.path.exists, paths)):
                raise
            continue
        # First whether a set is being renamed, then the files: see uqff.container.atomic.
        if len(paths) == 1 or (are_in_force(paths) and all(each.is_current() for each in file._files)):
            return file
        file.close()
    raise ShardError("set of shards is replaced again and again while it is opened", file=str(paths[0]))
