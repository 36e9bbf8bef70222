"""Files that appear whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from uqff.container.leftovers import create_locked, remove_left, try_lock
from uqff.errors import UnsupportedError
from uqff.system import can_lock

__all__ = ["atomic_file", "atomic_files", "check_outputs", "copy_durably", "flush_to_disk", "settle", "sync_directory"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` when the block ends well, and vanishes when it does not.

    A crash at any moment leaves the old file or the new one.
    """
    with atomic_files() as stage, open(stage(path), "xb") as file:
        yield file
        flush_to_disk(file)


@contextlib.contextmanager
def atomic_files(pending: Path | None = None) -> Iterator[Callable[[Path], Path]]:
    """A set of files that replace older ones together.

    Gives a function from the path of a file to the one under which it is to be made; whoever makes it flushes it to
    the disk.  They lie in directories ``.<name>.tmp-<random>`` beside their places.  All are renamed when the block
    ends well; none is when it does not, and nothing stays behind.  What a killed process has left, the next one for the
    same file removes.

    Args:
        pending: what the directory is called while its files are renamed, one after the other. Where a process was
            killed at that, it holds those that are not in their places yet: readers look there first, and
            :func:`settle` brings it to an end. None if nobody looks.

    Raises:
        FileExistsError: in a file's place stands what is none, such as a device or a pipe (when it is staged).
        IsADirectoryError: a directory does.
    """
    homes: dict[Path, tuple[Path, int | None]] = {}
    staged: list[Path] = []

    def stage(path: Path) -> Path:
        _check_place(path)
        if path.parent not in homes:
            remove_left(path)
            homes[path.parent] = create_locked(path)
        staged.append(path)
        return homes[path.parent][0] / path.name

    try:
        yield stage
        if pending is not None and len(staged) > 1:
            home, handle = homes[pending.parent]
            sync_directory(home)
            os.rename(home, pending)  # from here on the set is the new one
            homes[pending.parent] = pending, handle
            sync_directory(pending.parent)
        for path in staged:
            os.replace(homes[path.parent][0] / path.name, path)
        for directory in homes:
            sync_directory(directory)
    except BaseException:
        for home, _ in homes.values():
            if home != pending:
                shutil.rmtree(home, ignore_errors=True)
        raise
    finally:
        for home, handle in homes.values():
            with contextlib.suppress(OSError):  # what is pending stays, with what is in it
                os.rmdir(home)
            if handle is not None:
                os.close(handle)


def check_outputs(*paths: str | os.PathLike[str] | None) -> None:
    """Find out before long work whether files could be put where they are wanted.

    Args:
        paths: of the files; None is no file.

    Raises:
        UnsupportedError: two are one file.
        OSError: see :func:`atomic_files`; or the directory is not there.
    """
    places: set[Path] = set()
    for path in (Path(each) for each in paths if each is not None):
        _check_place(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        if path.resolve() in places:
            raise UnsupportedError("two outputs in one file", file=str(path))
        places.add(path.resolve())


def _check_place(path: Path) -> None:
    """A rename would put a file over ``/dev/null``, or over the pipe that somebody reads from."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(f"exists and is not a file: {path}")


def settle(pending: Path) -> None:
    """Bring to an end what a killed process had begun: see :func:`atomic_files`.

    Raises:
        UnsupportedError: another process is at it.
    """
    if not pending.is_dir() or pending.is_symlink():
        return
    handle = try_lock(pending)
    if handle is None and can_lock() and pending.exists():
        raise UnsupportedError("another process writes these files", file=str(pending))
    try:
        for name in os.listdir(pending):
            os.replace(pending / name, pending.parent / name)
        sync_directory(pending.parent)
        os.rmdir(pending)
    finally:
        if handle is not None:
            os.close(handle)


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
