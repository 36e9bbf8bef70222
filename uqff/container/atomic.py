"""Files that appear whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "atomic_files", "sync_directory"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` when the block ends well, and vanishes when it does not.

    A crash at any moment leaves the old file or the new one.
    """
    with atomic_files() as create, create(path) as file:
        yield file


@contextlib.contextmanager
def atomic_files() -> Iterator[Callable[[Path], AbstractContextManager[BinaryIO]]]:
    """A set of files that replace older ones together.

    Gives a function that opens a file of the set; the file is flushed to disk when its own block ends.  All are renamed
    when the block of the set ends well; none is when it does not, and nothing stays behind.
    """
    written: list[tuple[Path, Path]] = []

    @contextlib.contextmanager
    def create(path: Path) -> Iterator[BinaryIO]:
        with _create_beside(path, written) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    try:
        yield create
        for temporary, path in written:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in written:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    for directory in {path.parent for _, path in written}:
        sync_directory(directory)


def _create_beside(path: Path, written: list[tuple[Path, Path]]) -> BinaryIO:
    """A new file in the directory of ``path``, noted in ``written``; the umask decides who may read it, as ever."""
    # Cut: with what is added, a name of 255 bytes would be too long for the file system.
    temporary = path.parent / f".{path.name[:50]}.{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    written.append((temporary, path))
    return os.fdopen(handle, "wb")


def sync_directory(directory: Path) -> None:
    """Make a rename in the directory survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
