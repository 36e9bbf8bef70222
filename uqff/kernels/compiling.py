"""How the kernels are compiled, and what keeps a compiled kernel from outliving its source.

numba keeps compiled code on disk and takes it again if the file that defines the function has the same size and time.
It does not see a change of what that function calls or takes from other files; and installers may give every version's
files one time.  So the kernels carry a stamp of their own: a digest of all sources that are compiled into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba

__all__ = ["OTHER_SOURCES", "inline", "kernel", "stamp", "subroutine"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

ROOM: Final = Path(__file__).parent

OTHER_SOURCES: Final = ("glibc.py", "families/hqq.py", "families/mxfp4.py")
"""Files of the package outside this room whose numbers are compiled into kernels."""


def kernel(function: _Function) -> _Function:
    """Compile what Python calls, at its first call: without the GIL, with C's division, kept on disk.

    Without ``fastmath`` the compiler neither reorders float operations nor fuses a product into a sum.
    """
    compiled = _compiled(function)
    kept: Any = getattr(compiled, "_cache", None)
    file: Any = getattr(kept, "_cache_file", None)
    if stamp() and hasattr(file, "_source_stamp"):
        file._source_stamp = stamp()
    elif hasattr(kept, "disable"):
        # Another numba than those we know, or sources that cannot be read: slow to start rather than stale.
        kept.disable()
    return cast(_Function, compiled)


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place where a cache could be written
        return numba.njit(**options)(function)


def inline(function: _Function) -> _Function:
    """Compile what kernels call, into each of them, so that sizes are constants there."""
    return cast(_Function, numba.njit(forceinline=True, error_model="numpy", fastmath=False)(function))


def subroutine(function: _Function) -> _Function:
    """Compile what kernels call rarely: LLVM decides whether it becomes part of them."""
    return cast(_Function, numba.njit(error_model="numpy", fastmath=False)(function))


@cache
def stamp() -> str:
    """A digest of the sources of this room and of :data:`OTHER_SOURCES`; empty if they cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in (*sorted(ROOM.glob("*.py")), *(ROOM.parent / name for name in OTHER_SOURCES)):
            source = path.read_bytes()
            digest.update(b"%s %d\n" % (path.name.encode(), len(source)))
            digest.update(source)
    except OSError:
        return ""
    return digest.hexdigest()
