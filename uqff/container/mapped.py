"""A file in memory without reading it: a private mapping, and the tensors in it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uqff.container.document import check_regular
from uqff.container.framing import Header, TensorEntry, parse_header
from uqff.container.mapping import Memory, memory_of
from uqff.errors import FormatError, MissingError, UnsupportedError, UqffError, located
from uqff.schema.buffers import flat_bytes
from uqff.system import advice as advice_number

if TYPE_CHECKING:
    import torch

__all__ = ["ListedFile", "MappedBytes", "MappedFile", "TensorMap"]

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


class MappedBytes:
    """A file, mapped; nothing of it is read. See :mod:`uqff.container.mapping`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory: Memory | None = None
        self._closed = False
        check_regular(path)
        with open(path, "rb", buffering=0) as file:
            self._status = os.fstat(file.fileno())
            size = self._status.st_size
            if size:
                self._memory = memory_of(file, size)
        self.view = memoryview(b"") if self._memory is None else self._memory.view()

    def is_current(self) -> bool:
        """Whether its name still leads to this very file."""
        try:
            return os.path.samestat(os.stat(self.path), self._status)
        except FileNotFoundError:
            return False

    def bytes_between(self, begin: int, end: int) -> memoryview:
        """The bytes from ``begin`` to ``end``.

        Raises:
            ValueError: the file is closed.
            FormatError: it has become shorter since it was opened: to look at what is missing would end the process.
        """
        if self._closed:
            raise ValueError(f"file is closed: {self.path}")
        self._check_length()
        return self.view[begin:end]

    def _check_length(self) -> None:
        if self._memory is None or not self._memory.depends:
            return
        try:
            now = os.stat(self.path)
        except OSError:
            return  # it has lost its name, not its bytes
        if now.st_size < self._status.st_size and os.path.samestat(now, self._status):
            raise FormatError(
                "file has become shorter since it was opened",
                file=str(self.path),
                expected=f"{self._status.st_size} bytes",
                got=now.st_size,
            )

    def advise(self, begin: int, end: int, advice: str) -> None:
        """Tell the system how the pages of bytes ``begin`` to ``end`` will be used, if it takes such advice.

        Args:
            begin: first byte; the page that it lies in is meant as a whole.
            end: byte after the last.
            advice: ``DONTNEED``, ``WILLNEED``, ...: one of ``mmap.MADV_*``.
        """
        value = advice_number(advice)
        if self._memory is not None and value is not None and begin < end:
            start = begin - begin % mmap.PAGESIZE
            self._memory.advise(value, start, end - start)

    def close(self) -> None:
        """Unmap the file, or leave that to the last tensor that still looks into it."""
        self._closed = True
        self.view = memoryview(b"")
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class ListedFile(NamedTuple):
    """A file whose tensors are listed in it, of whatever format: all its bytes, and the list as of safetensors."""

    view: memoryview
    header: Header


class MappedFile(MappedBytes):
    """A safetensors file, mapped; only its header is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with located(file=path):
                self.header: Header = parse_header(self.view)
        except UqffError:
            self.close()
            raise

    def slice(self, entry: TensorEntry) -> memoryview:
        """The bytes of an entry.

        Raises:
            ValueError: the file is closed.
        """
        return self.bytes_between(entry.begin, entry.end)


class TensorMap(Mapping[str, "torch.Tensor"]):
    """Plain tensors of mapped files by name; each is made, as a view, when it is asked for."""

    def __init__(self, files: list[MappedFile]) -> None:
        self._places: dict[str, tuple[MappedFile, TensorEntry]] = {}
        for file in files:
            for name, entry in file.header.entries.items():
                if name in self._places:
                    other = self._places[name][0].path
                    raise FormatError(
                        "tensor occurs in two files", file=str(file.path), field=name, got=f"also {other}"
                    )
                self._places[name] = (file, entry)

    @classmethod
    def of(cls, places: Mapping[str, tuple[MappedFile, TensorEntry]]) -> TensorMap:
        """A map of chosen entries."""
        chosen = cls([])
        chosen._places = dict(places)
        return chosen

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        file, entry = self._place(name)
        dtype = getattr(torch, _TORCH_NAMES.get(entry.dtype, ""), None)
        if dtype is None:
            raise UnsupportedError(
                "torch has no such dtype", file=str(file.path), field=name, offset=entry.begin, got=entry.dtype
            )
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        flat = flat_bytes(file.slice(entry))
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(entry.shape)

    def _place(self, name: str) -> tuple[MappedFile, TensorEntry]:
        if name not in self._places:
            files = {str(file.path) for file, _ in self._places.values()}
            raise MissingError("no such tensor", file=min(files, default=None), field=name)
        return self._places[name]

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor; does not import torch."""
        file, entry = self._place(name)
        return file.slice(entry)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor, without making it."""
        return self._place(name)[1]

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's bytes; a later look reads them from the disk again."""
        file, entry = self._place(name)
        file.advise(entry.begin, entry.end, "DONTNEED")
