"""A file's bytes as memory: mapped, or read where that is asked for (``UQFF_MMAP=0``).

The mapping is private and copy-on-write: torch can wrap it without a copy, and the file on disk cannot be changed
through it.  A file that is cut while it is mapped ends the process with SIGBUS when the missing pages are looked at; no
program can prevent that for a mapping.  ``UQFF_MMAP=0`` reads each file whole instead, into memory of its size.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from io import FileIO
from typing import Any, Final, Protocol

from uqff.errors import FormatError

__all__ = ["VARIABLE", "Memory", "is_read", "memory_of"]

VARIABLE: Final = "UQFF_MMAP"
"""The variable of the environment that says ``0`` where files are to be read, and ``1`` or nothing where not."""

MANY: Final = 256
"""File descriptors after which mappings keep none: a model may have more shards than a process may have open files."""

NORESERVE: Final[int] = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Without it a kernel may refuse to map, copy-on-write, a file that is larger than its memory."""


class Memory(Protocol):
    """The bytes of a file.

    Attributes:
        depends: whether they go when the file becomes shorter.
    """

    depends: bool

    def view(self) -> memoryview:
        """All of them."""

    def advise(self, advice: int, start: int, length: int) -> None:
        """Tell the system how pages will be used: one of ``mmap.MADV_*``."""

    def close(self) -> None:
        """Give them back, or leave that to the last view."""


class _Map:
    """A mapping by Python's own module; before Python 3.13 it keeps a descriptor of the file."""

    depends = True

    def __init__(self, file: FileIO, size: int) -> None:
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) and os.name != "nt" else {}
        if hasattr(mmap, "MAP_PRIVATE"):
            options |= {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        else:
            options |= {"access": mmap.ACCESS_COPY}
        self._map = mmap.mmap(file.fileno(), size, **options)

    def view(self) -> memoryview:
        return memoryview(self._map)

    def advise(self, advice: int, start: int, length: int) -> None:
        self._map.madvise(advice, start, length)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # views are left
            self._map.close()


class _FreeMap:
    """A mapping that keeps no descriptor; it is given back when its last view is gone."""

    depends = True

    def __init__(self, file: FileIO, size: int) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.mmap.restype = ctypes.c_void_p
        word, number = ctypes.c_size_t, ctypes.c_int
        self._library.mmap.argtypes = (ctypes.c_void_p, word, number, number, number, ctypes.c_int64)
        self._library.munmap.argtypes = (ctypes.c_void_p, word)
        self._library.madvise.argtypes = (ctypes.c_void_p, word, number)
        flags, access = mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self._address = self._library.mmap(None, size, access, flags, file.fileno(), 0)
        if self._address in (None, ctypes.c_void_p(-1).value):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(file.name))
        self._bytes = (ctypes.c_uint8 * size).from_address(self._address)
        # Not at exit: views may outlive it.
        weakref.finalize(self._bytes, self._library.munmap, self._address, size).atexit = False

    def view(self) -> memoryview:
        return memoryview(self._bytes).cast("B")

    def advise(self, advice: int, start: int, length: int) -> None:
        self._library.madvise(self._address + start, length, advice)

    def close(self) -> None:
        del self._bytes


class _Read:
    """The bytes themselves."""

    depends = False

    def __init__(self, file: FileIO, size: int) -> None:
        self._bytes = bytearray(size)
        rest = memoryview(self._bytes)
        while rest and (done := file.readinto(rest)):
            rest = rest[done:]
        if rest:
            got = size - len(rest)
            raise FormatError(
                "file has become shorter while it was read", file=str(file.name), expected=f"{size} bytes", got=got
            )

    def view(self) -> memoryview:
        return memoryview(self._bytes)

    def advise(self, advice: int, start: int, length: int) -> None:
        """Nothing: the bytes cannot be had again."""

    def close(self) -> None:
        self._bytes = bytearray()


def _next_descriptor(file: FileIO) -> int:
    """The number that a mapping's own descriptor would have."""
    try:
        number = os.dup(file.fileno())
    except OSError:
        return MANY
    os.close(number)
    return number


def is_read() -> bool:
    """Whether ``UQFF_MMAP`` says that files are to be read.

    Raises:
        ValueError: it says neither ``0``, ``1`` nor nothing.
    """
    said = os.environ.get(VARIABLE, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected '0' or '1', got {said!r}")
    return said == "0"


def memory_of(file: FileIO, size: int) -> Memory:
    """The first ``size`` bytes of an open file, which may be closed afterwards.

    Raises:
        FormatError: it has become shorter.
        OSError: it cannot be mapped, or not be read.
        ValueError: see :func:`is_read`.
    """
    if is_read():
        return _Read(file, size)
    if sys.version_info < (3, 13) and hasattr(mmap, "MADV_DONTNEED") and _next_descriptor(file) >= MANY:
        return _FreeMap(file, size)
    return _Map(file, size)
