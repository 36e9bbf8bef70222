"""A safetensors file that is written tensor by tensor, in any order: all sizes are known before the first payload."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from uqff.codec import blob
from uqff.codec.entries import to_entries
from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.framing import DTYPE_BITS, build_header
from uqff.container.save import SHARD_BYTES, plan_shards
from uqff.container.save_v1 import entry_items, metadata_of, plan_items, version_entries
from uqff.container.shards import shard_name
from uqff.errors import FormatError, located
from uqff.schema.bricks import Placeholder
from uqff.schema.entries import FIRST, RawTensor

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["StreamedFile", "StreamedLayers", "flush_to_disk", "layer_sizes"]


class StreamedFile:
    """A new safetensors file. The header is written at once; each tensor goes to its place when it is ready.

    The bytes are those that the reference implementation writes, whatever the order of the calls.  The file has its
    own name from the start: whoever needs it whole or not at all keeps it in a temporary directory.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        """Create the file, or go on with one that an interrupted run has begun.

        Args:
            path: of the file.
            tensors: see :func:`uqff.container.framing.build_header`.
            metadata: likewise.
            begun: whether it is there. What is in it counts as missing until :meth:`skip`.

        Raises:
            FormatError: what is there is not the beginning of this file.
        """
        tensors = list(tensors)
        header, order = build_header(tensors, metadata)
        sizes = {name: math.prod(shape) * DTYPE_BITS[dtype] // 8 for name, dtype, shape in tensors}
        self.path = path
        self.nbytes = len(header)
        self._missing: dict[str, tuple[int, int]] = {}
        self._left: dict[str, int] = {}
        for name in order:
            self._missing[name] = (self.nbytes, self.nbytes + sizes[name])
            self.nbytes += sizes[name]
        self._file = open(path, "r+b" if begun else "xb", buffering=0)  # noqa: SIM115  (closed by finish or close)
        try:
            if begun and self._file.read(len(header)) != header:
                raise FormatError("not the file that was begun", file=str(path))
            self._write(0, header)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Write the payload of a tensor.

        Args:
            name: of the tensor; each is written once.
            chunks: bytes-like objects that together are the payload.

        Raises:
            FormatError: the payload has another size than announced.
            OSError: writing failed.
        """
        begin, end = self._missing.pop(name)
        at = begin
        for chunk in chunks:
            at = self._write(at, chunk)
        if at != end:
            raise FormatError(
                "tensor changed while it was written",
                file=str(self.path),
                field=name,
                expected=f"{end - begin} bytes",
                got=at - begin,
            )

    def skip(self, name: str) -> None:
        """Leave a tensor as it was written before."""
        del self._missing[name]

    def flush(self) -> None:
        """Make what was written survive a power cut."""
        flush_to_disk(self._file)

    def write_piece(self, name: str, at: int, chunk: Any) -> None:
        """Write some of a tensor's payload; all pieces together are as long as the payload, and none overlap.

        Args:
            name: of the tensor.
            at: where the piece begins in the payload.
            chunk: a bytes-like object.

        Raises:
            FormatError: the pieces are longer than announced.
            OSError: writing failed.
        """
        begin, end = self._missing[name]
        size = memoryview(chunk).nbytes
        left = self._left.get(name, end - begin) - size
        if left < 0 or at + size > end - begin:
            raise FormatError(
                "tensor changed while it was written",
                file=str(self.path),
                field=name,
                expected=f"{end - begin} bytes",
                got=f"{size} at {at}",
            )
        self._write(begin + at, chunk)
        self._left[name] = left
        if not left:
            del self._missing[name]

    def _write(self, at: int, chunk: Any) -> int:
        view = memoryview(chunk).cast("B")
        self._file.seek(at)
        while len(view):
            # A write of more than 2 GiB is cut by the system.
            written = self._file.write(view)
            view = view[written:]
            at += written
        return at

    def finish(self) -> None:
        """Flush the file to the disk.

        Raises:
            FormatError: a tensor has not been written.
        """
        if self._missing:
            raise FormatError("tensor was never written", file=str(self.path), field=next(iter(self._missing)))
        flush_to_disk(self._file)
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.close()


class StreamedLayers:
    """The ``.uqff`` shards of one quantised model, ``<stem>-0.uqff`` and on, written layer by layer in any order.

    Of either generation: blobs under layer indices, or entries under weight paths.

    Attributes:
        files: the shards, in order.
        version: that is written.
        sizes: bytes of each layer's payload, by key.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        outlines: Mapping[str, Layer],
        version: tuple[int, int, int],
        shard_bytes: int = SHARD_BYTES,
        *,
        metadata: Mapping[str, str] | None = None,
        versions: Mapping[str, tuple[int, int, int]] | None = None,
        begun: bool = False,
    ) -> None:
        """Create the files, or go on with those that an interrupted run has begun.

        Args:
            directory: where.
            stem: file names without number.
            outlines: key (decimal layer index in 0.x, weight path in 1.x) to layer; tensors may be on the meta device.
            version: 0.1.0 to 0.2.0, or 1.0.0 to 1.2.0.
            shard_bytes: payload after which a new shard begins.
            metadata: of 1.x, texts that stand in every shard beside those of the version.
            versions: of 0.x, those of the blobs that have another, by key.
            begun: see :class:`StreamedFile`.

        Raises:
            UqffError: a layer cannot be expressed in the version, or a key is none of its generation.
        """
        self.files: list[StreamedFile] = []
        self.version = Version(*version)
        self.sizes: dict[str, int] = {}
        self._file_of: dict[str, StreamedFile] = {}
        self._versions = {key: Version(*each) for key, each in (versions or {}).items()}
        self._outlines = outlines
        self._begun = begun
        self._stacks: dict[str, dict[str, RawTensor]] = {}
        try:
            if self.version < FIRST:
                self._plan_blobs(directory, stem, outlines, shard_bytes)
            else:
                self._plan_entries(directory, stem, outlines, shard_bytes, metadata or {})
        except BaseException:
            self.close()
            raise

    def _plan_blobs(self, directory: Path, stem: str, outlines: Mapping[str, Layer], shard_bytes: int) -> None:
        for key, layer in outlines.items():
            self.sizes |= layer_sizes({key: layer}, self._versions.get(key, self.version))
        for number, shard in enumerate(plan_shards({int(key): size for key, size in self.sizes.items()}, shard_bytes)):
            keys = [str(index) for index in shard]
            self._create(directory / shard_name(stem, number), [(key, "U8", (self.sizes[key],)) for key in keys], None)

    def _plan_entries(
        self,
        directory: Path,
        stem: str,
        outlines: Mapping[str, Layer],
        shard_bytes: int,
        metadata: Mapping[str, str],
    ) -> None:
        items = entry_items(outlines, self.version)
        for item in items:
            if item.key is not None:
                self.sizes[item.key] = self.sizes.get(item.key, 0) + item.nbytes
        texts = {**(metadata_of(self.version) or {}), **metadata} or None
        for number, shard in enumerate(plan_items(items, shard_bytes)):
            tensors = [(item.name, item.dtype, item.shape) for item in shard]
            self._create(directory / shard_name(stem, number), tensors, texts)
        for name, entry in version_entries(self.version).items():
            self._file_of[name].write(name, [entry.data])

    def _create(
        self, path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
    ) -> None:
        file = StreamedFile(path, tensors, metadata, begun=self._begun)
        self.files.append(file)
        self._file_of.update((name, file) for name, _, _ in tensors)

    def write(self, key: str, layer: Layer) -> None:
        """Write a layer; each is written once.

        Raises:
            FormatError: it has other sizes than its outline.
            OSError: writing failed.
        """
        with located(layer=key):
            if self.version < FIRST:
                version = self._versions.get(key, self.version)
                self._file_of[key].write(key, blob.chunks(layer, version=version))
                return
            for suffix, entry in to_entries(layer, self.version).items():
                name = f"{key}.{suffix}"
                self._file_of[name].write(name, [entry.data])

    def skip(self, key: str) -> None:
        """Leave a layer as it was written before."""
        if self.version < FIRST:
            self._file_of[key].skip(key)
            return
        for suffix in to_entries(self._outlines[key], self.version):
            name = f"{key}.{suffix}"
            self._file_of[name].skip(name)

    def write_expert(self, key: str, expert: int, layer: Layer) -> None:
        """Write what one expert is of a stacked layer of 1.x; each is written once, in any order.

        Args:
            key: of the stacked layer, whose payloads are those of the experts one after the other.
            expert: its number.
            layer: its weight ``[out, in]``.

        Raises:
            FormatError: it has other sizes than its part of the outline.
            OSError: writing failed.
        """
        with located(layer=key):
            if key not in self._stacks:
                self._stacks[key] = to_entries(self._outlines[key], self.version)
            parts = to_entries(layer, self.version)
            for suffix, entry in self._stacks[key].items():
                name = f"{key}.{suffix}"
                if isinstance(entry.data, Placeholder):
                    data = parts[suffix].data
                    self._file_of[name].write_piece(name, expert * data.nbytes, data)
                elif expert == 0:
                    self._file_of[name].write(name, [entry.data])

    def finish(self) -> None:
        """Flush all shards to the disk."""
        for file in self.files:
            file.finish()

    def close(self) -> None:
        """Close all shards as they are."""
        for file in self.files:
            file.close()


def layer_sizes(outlines: Mapping[str, Layer], version: tuple[int, int, int]) -> dict[str, int]:
    """Bytes of each layer's payload, by key: of its blob in 0.x, of all its entries in 1.x.

    Raises:
        UqffError: a layer cannot be expressed in the version.
    """
    sizes: dict[str, int] = {}
    for key, layer in outlines.items():
        with located(layer=key):
            if version < FIRST:
                sizes[key] = blob.blob_size(layer, version=version)
            else:
                sizes[key] = sum(entry.data.nbytes for entry in to_entries(layer, version).values())
    return sizes


def flush_to_disk(file: IO[bytes]) -> None:
    """Make what was written to a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())
