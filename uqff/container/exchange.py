"""Two directories exchange their names in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Final

__all__ = ["exchange"]

AT_FDCWD: Final = -100
RENAME_EXCHANGE: Final = 2
"""Of Linux, ``fcntl.h`` and ``linux/fs.h``; of macOS, ``RENAME_SWAP`` of ``sys/stdio.h`` is 2, too."""

UNABLE: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV)
"""What a kernel or a file system says that has no such call; ``EXDEV`` is said across layers of overlayfs."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories of the same file system, so that there is no moment without either.

    Returns:
        False, and nothing has been done, if the system cannot.

    Raises:
        OSError: it can, and did not.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        function = library.renameat2 if sys.platform == "linux" else library.renamex_np
    except (OSError, AttributeError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        failed = function(AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE))
    else:
        failed = function(*names, ctypes.c_uint(RENAME_EXCHANGE))
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
