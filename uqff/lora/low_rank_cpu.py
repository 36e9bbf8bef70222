"""The twin of :mod:`uqff.lora.low_rank` on the CPU: rows among the threads, a piece of A at a time in the cache."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.simd.compiling import kernel
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges

__all__ = ["add"]

F32: TypeAlias = npt.NDArray[np.float32]

PIECE: Final = 1024
"""Columns that are added up together: what a kernel keeps of them fits the nearest cache, A of rank 64 the next."""

GRAIN: Final = 8
"""Rows of a range at least."""


def add(weight: F32, b: F32, a: F32, scale: np.float32, threads: int | None = None) -> None:
    """See :func:`uqff.lora.low_rank.add_reference`; all C-contiguous."""
    b, a = b.view(), a.view()
    # One compiled version serves read-only and writeable factors: numba tells them apart.
    b.flags.writeable = a.flags.writeable = False
    run_ranges(lambda lo, hi: add_rows(weight, b, a, scale, lo, hi), len(weight), grain=GRAIN, threads=threads)


@kernel
def add_rows(weight: Any, b: Any, a: Any, scale: Any, lo: int, hi: int) -> None:
    """Rows [lo, hi)."""
    memory = scratch(PIECE, np.float32)
    ranks = a.shape[0]
    for start in range(0, weight.shape[1], PIECE):
        stop = min(start + PIECE, weight.shape[1])
        part = memory[: stop - start]
        for row in range(lo, hi):
            first, factor = a[0, start:stop], b[row, 0]
            for k in range(part.size):
                part[k] = factor * first[k]
            for rank in range(1, ranks - 3, 4):  # four at a time, each sum rounded, spare the memory in between
                a0, a1 = a[rank, start:stop], a[rank + 1, start:stop]
                a2, a3 = a[rank + 2, start:stop], a[rank + 3, start:stop]
                b0, b1, b2, b3 = b[row, rank], b[row, rank + 1], b[row, rank + 2], b[row, rank + 3]
                for k in range(part.size):
                    part[k] = (((part[k] + b0 * a0[k]) + b1 * a1[k]) + b2 * a2[k]) + b3 * a3[k]
            for rank in range(ranks - (ranks - 1) % 4, ranks):
                last, factor = a[rank, start:stop], b[row, rank]
                for k in range(part.size):
                    part[k] += factor * last[k]
            target = weight[row, start:stop]
            for k in range(part.size):
                target[k] += part[k] * scale
