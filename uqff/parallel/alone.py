"""Torch's own operations on the calling thread, for a token that has too little in them to share.

Torch shares attention among OpenMP's threads whatever its size. They wait for each other at its end, spinning: where a
CPU is busy the token waits until the system gives them one, and where none is they keep the one that the threads of the
next product need. With one row both take longer than attention itself.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from uqff.system import loaded_library

__all__ = ["torch_alone"]


@contextlib.contextmanager
def torch_alone() -> Iterator[None]:
    """Torch's operations of this thread on this thread alone.

    By OpenMP's own count, which each thread has for itself: that of ``torch.set_num_threads`` is one for threads that
    have yet to begin, too. Where torch has no OpenMP, or it cannot be found, nothing changes.
    """
    count = _openmp()
    before = torch.get_num_threads()
    if count is None or before == 1:
        yield
        return
    count(1)
    try:
        yield
    finally:
        count(before)


@cache
def _openmp() -> Callable[[int], None] | None:
    """``omp_set_num_threads`` of the OpenMP that torch has loaded."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    library = loaded_library(found[0]) if found else None
    count: Any = getattr(library, "omp_set_num_threads", None)
    if count is None:
        return None
    count.argtypes, count.restype = [ctypes.c_int], None
    called: Callable[[int], None] = count
    return called
