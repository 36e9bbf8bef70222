"""A safetensors file that is written tensor by tensor, in any order: all sizes are known before the first payload."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uqff.container.atomic import flush_to_disk
from uqff.container.framing import DTYPE_BITS, build_header
from uqff.errors import FormatError

if TYPE_CHECKING:
    from io import FileIO
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["TensorWriter"]


class TensorWriter:
    """A new safetensors file. The header is written at once; each tensor goes to its place when it is ready.

    The bytes are those that the reference implementation writes, whatever the order of the calls.  The file has its
    own name from the start: whoever needs it whole or not at all makes it under a temporary one.  It is open while some
    of its tensors are written and some are not, so that a model may have more files than a process may open.

    Attributes:
        path: of the file.
        nbytes: its size.
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
            FileExistsError: it is there although it was not begun.
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
        self._file: FileIO | None = None
        self._flushed = False
        if begun:
            with open(path, "rb") as file:
                if file.read(len(header)) != header:
                    raise FormatError("not the file that was begun", file=str(path))
        else:
            with open(path, "xb") as file:
                file.write(header)

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Write the payload of a tensor.

        Args:
            name: of the tensor; each is written once.
            chunks: bytes-like objects that together are the payload.

        Raises:
            FormatError: the payload has another size than announced.
            OSError: writing failed.
        """
        begin, end = self._missing[name]
        at = begin
        for chunk in chunks:
            at = self._write(at, chunk)
        if at != end:
            raise self._changed(name, at - begin)
        self._done(name)

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
            raise self._changed(name, f"{size} at {at}")
        self._write(begin + at, chunk)
        self._left[name] = left
        if not left:
            self._done(name)

    def skip(self, name: str) -> None:
        """Leave a tensor as it was written before."""
        self._done(name)

    def flush(self) -> None:
        """Make what was written survive a power cut."""
        if self._flushed:
            return
        was_open = self._file is not None
        flush_to_disk(self._opened())
        self._flushed = True
        if not was_open:
            self.close()

    def finish(self) -> None:
        """Flush the file to the disk.

        Raises:
            FormatError: a tensor has not been written.
        """
        if self._missing:
            raise FormatError("tensor was never written", file=str(self.path), field=next(iter(self._missing)))
        self.flush()
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (closed when nothing is missing, or by close)
        return self._file

    def _write(self, at: int, chunk: Any) -> int:
        view, file = memoryview(chunk).cast("B"), self._opened()
        self._flushed = False
        file.seek(at)
        while len(view):
            # A write of more than 2 GiB is cut by the system.
            written = file.write(view)
            view = view[written:]
            at += written
        return at

    def _done(self, name: str) -> None:
        del self._missing[name]
        if not self._missing and self._file is not None:
            self.flush()
            self.close()

    def _changed(self, name: str, got: object) -> FormatError:
        begin, end = self._missing[name]
        expected = f"{end - begin} bytes"
        path = str(self.path)
        return FormatError("tensor changed while it was written", file=path, field=name, expected=expected, got=got)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.close()
