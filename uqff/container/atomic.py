"""Files that appear whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

__all__ = ["atomic_file", "atomic_files", "copy_durably", "flush_to_disk", "sync_directory"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` when the block ends well, and vanishes when it does not.

    A crash at any moment leaves the old file or the new one.
    """
    with atomic_files() as stage, open(stage(path), "xb") as file:
        yield file
        flush_to_disk(file)


@contextlib.contextmanager
def atomic_files() -> Iterator[Callable[[Path], Path]]:
    """A set of files that replace older ones together.

    Gives a function from the path of a file to the one under which it is to be made; whoever makes it flushes it to
    the disk.  All are renamed when the block ends well; none is when it does not, and nothing stays behind.
    """
    staged: list[tuple[Path, Path]] = []

    def stage(path: Path) -> Path:
        # Cut: with what is added, a name of 255 bytes would be too long for the file system.
        temporary = path.parent / f".{path.name[:50]}.{secrets.token_hex(8)}.tmp"
        staged.append((temporary, path))
        return temporary

    try:
        yield stage
        for temporary, path in staged:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in staged:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    for directory in {path.parent for _, path in staged}:
        sync_directory(directory)


def flush_to_disk(file: IO[bytes]) -> None:
    """Make what was written to a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and flush them to the disk."""
    with open(source, "rb") as original, open(target, "xb") as copy:
        shutil.copyfileobj(original, copy)
        flush_to_disk(copy)


def sync_directory(directory: Path) -> None:
    """Make a rename in the directory survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
