"""The SHA-256 of files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uqff.errors import FormatError
from uqff.progress import Progress, Steps
from uqff.simd.threads import num_threads

__all__ = ["FileDigest", "digest_files"]

CHUNK: Final = 1 << 20
"""Bytes of a file that are read together."""


@dataclass(frozen=True)
class FileDigest:
    """A file: its name in the directory, its size, and the SHA-256 of its bytes in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


def digest_files(directory: Path, names: Sequence[str], *, progress: Progress | None = None) -> list[FileDigest]:
    """The SHA-256 of files, on several threads; no file is held in memory.

    Args:
        directory: where they are.
        names: of the files.
        progress: called after each file.

    Raises:
        FormatError: a file is a pipe or a device.
        OSError: a file cannot be read.
    """
    size = sum(_size_of_file(directory / name) for name in names)
    steps = Steps(progress, "checksum", len(names), size, "bytes")
    digests: list[FileDigest] = []
    with ThreadPoolExecutor(num_threads(), thread_name_prefix="uqff-checksum") as pool:
        try:
            for digest in pool.map(lambda name: _digest_file(directory, name), names):
                digests.append(digest)
                steps.add(digest.name, digest.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return digests


def _size_of_file(path: Path) -> int:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for a writer
        raise FormatError("not a regular file", file=str(path))
    return found.st_size


def _digest_file(directory: Path, name: str) -> FileDigest:
    digest, nbytes, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    with open(directory / name, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            nbytes += count
    return FileDigest(name, nbytes, digest.hexdigest())
