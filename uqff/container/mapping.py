"""A file's bytes as memory: mapped, or read where that is asked for (``UQFF_MMAP=0``).

The mapping is private and copy-on-write: torch can wrap it without a copy, and the file on disk cannot be changed
through it.  A file that is cut while it is mapped ends the process with SIGBUS when the missing pages are looked at; no
program can prevent that for a mapping.  ``UQFF_MMAP=0`` reads each file whole instead, into memory of its size.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from io import FileIO
from typing import Any, Final, Protocol

from uqff.errors import FormatError
from uqff.system import FreeMap, advise, keeps_descriptors, mapping_options

__all__ = ["VARIABLE", "Memory", "is_read", "memory_of"]

VARIABLE: Final = "UQFF_MMAP"
"""The variable of the environment that says ``0`` where files are to be read, and ``1`` or nothing where not."""

MANY: Final = 256
"""File descriptors after which mappings keep none: a model may have more shards than a process may have open files."""


class Memory(Protocol):
    """The bytes of a file.

    Attributes:
        depends: whether they go when the file becomes shorter.
    """

    depends: bool

    def view(self) -> memoryview:
        """All of them."""

    def advise(self, advice: int, start: int, length: int) -> None:
        """Tell the system how pages will be used: a number of :func:`uqff.system.advice`."""

    def close(self) -> None:
        """Give them back, or leave that to the last view."""


class _Map:
    """A mapping: a ``FreeMap``, or by Python's own module, which before 3.13 keeps a descriptor of the file."""

    depends = True

    def __init__(self, mapping: Any) -> None:
        self._map = mapping

    def view(self) -> memoryview:
        return self._map.view() if isinstance(self._map, FreeMap) else memoryview(self._map)

    def advise(self, advice: int, start: int, length: int) -> None:
        advise(self._map, advice, start, length)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # views are left
            self._map.close()


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
    if keeps_descriptors() and _next_descriptor(file) >= MANY:
        return _Map(FreeMap(file, size))
    return _Map(mmap.mmap(file.fileno(), size, **mapping_options()))
