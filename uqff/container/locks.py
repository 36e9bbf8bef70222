"""Locks of directories, where the system has them: only here and in ``uqff.simd.compiling`` is ``fcntl`` asked for."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["can_lock", "lock", "open_to_lock"]


def can_lock() -> bool:
    """Whether a directory can be locked: else two runs for one place are not kept apart."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return False
    return True


def open_to_lock(path: Path) -> int:
    """A handle of a file or directory, not of what a link leads to, and without waiting for the writer of a pipe.

    Raises:
        OSError: there is no such thing, or it may not be read.
    """
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def lock(handle: int) -> bool:
    """Lock what a handle stands for, until that is closed; False if another process has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
