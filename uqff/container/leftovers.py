"""What is made beside its place, and what killed processes have left of it: locked while somebody is at it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from uqff.system import can_lock, lock, open_to_lock

__all__ = ["create_beside", "create_locked", "is_left", "remove_left", "try_lock"]

_HEX = r"[0-9a-f]{16}"


def try_lock(path: Path) -> int | None:
    """A handle that holds a lock; None if what is there is another's, or gone, or the system has no such locks."""
    if not can_lock():
        return None
    try:
        handle = open_to_lock(path)
    except OSError:
        return None
    if lock(handle):
        return handle
    os.close(handle)
    return None


def create_beside(target: Path, what: str) -> Path:
    """A new directory beside the target; the umask decides who may read it, as ever."""
    # Cut: with what is added, a name of 255 bytes would be too long for the file system.
    path = target.parent / f".{target.name[:50]}.{what}-{secrets.token_hex(8)}"
    path.mkdir()
    return path


def create_locked(target: Path) -> tuple[Path, int | None]:
    """A new directory beside the target, locked so that nobody takes it for one that was left behind."""
    for _ in range(10):
        staging = create_beside(target, "tmp")
        handle = try_lock(staging)
        if handle is not None and staging.is_dir():
            return staging, handle
        if handle is not None:
            os.close(handle)
        elif staging.is_dir():
            return staging, None
    raise FileExistsError(f"another process removes what is made beside {target}")


def is_left(target: Path, name: str, what: str = "tmp") -> bool:
    """Whether a name is one that :func:`create_beside` gives."""
    return re.fullmatch(re.escape(f".{target.name[:50]}.{what}-") + _HEX, name) is not None


def remove_left(target: Path, what: str = "tmp") -> None:
    """Remove what killed processes have left that were to make the same target: what nobody holds a lock on."""
    with os.scandir(target.parent) as entries:
        left = [
            each.path for each in entries if is_left(target, each.name, what) and each.is_dir(follow_symlinks=False)
        ]
    for path in map(Path, left):
        handle = try_lock(path)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)
