"""A safetensors file that is written tensor by tensor, in any order: all sizes are known before the first payload."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from uqff.container.framing import DTYPE_BITS, build_header
from uqff.container.save import SHARD_BYTES, plan_shards
from uqff.container.shards import shard_name
from uqff.errors import FormatError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["StreamedFile", "StreamedShards", "flush_to_disk"]


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
    ) -> None:
        """Create the file; see :func:`uqff.container.framing.build_header` for the arguments."""
        tensors = list(tensors)
        header, order = build_header(tensors, metadata)
        sizes = {name: math.prod(shape) * DTYPE_BITS[dtype] // 8 for name, dtype, shape in tensors}
        self.path = path
        self.nbytes = len(header)
        self._missing: dict[str, tuple[int, int]] = {}
        for name in order:
            self._missing[name] = (self.nbytes, self.nbytes + sizes[name])
            self.nbytes += sizes[name]
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  (closed by finish or close)
        try:
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


class StreamedShards:
    """The ``.uqff`` shards of one quantised model, ``<stem>-0.uqff`` and on, written layer by layer in any order."""

    def __init__(self, directory: Path, stem: str, sizes: Mapping[int, int], shard_bytes: int = SHARD_BYTES) -> None:
        """Create the files.

        Args:
            directory: where.
            stem: file names without number.
            sizes: layer index to bytes of its blob.
            shard_bytes: payload after which a new shard begins.
        """
        self.files: list[StreamedFile] = []
        self._file_of: dict[int, StreamedFile] = {}
        try:
            for number, shard in enumerate(plan_shards(sizes, shard_bytes)):
                path = directory / shard_name(stem, number)
                file = StreamedFile(path, [(str(index), "U8", (sizes[index],)) for index in shard])
                self.files.append(file)
                self._file_of.update(dict.fromkeys(shard, file))
        except BaseException:
            self.close()
            raise

    def write(self, index: int, chunks: Iterable[Any]) -> None:
        """Write the blob of a layer; see :meth:`StreamedFile.write`."""
        self._file_of[index].write(str(index), chunks)

    def finish(self) -> None:
        """Flush all shards to the disk."""
        for file in self.files:
            file.finish()

    def close(self) -> None:
        """Close all shards as they are."""
        for file in self.files:
            file.close()


def flush_to_disk(file: IO[bytes]) -> None:
    """Make what was written to a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())
