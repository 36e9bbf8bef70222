"""Memory for the kernels: tensors as byte arrays, and new tensors whose first use does not cost more than the kernel.

A fresh page has to be zeroed and mapped on its first write, by the system and not by our threads.  numpy asks Linux for
pages of 2 MiB, torch takes the default of 4 KiB.  A Q4K weight of 4096 x 4096 to float32 (64 MiB) on 2 cores: 4 ms into
warm memory, 14 ms into new memory of numpy, 60 ms into new memory of torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["aligned_bytes", "bytes_of", "empty"]

_LINE = 64
"""Bytes of a cache line: a vector that fills a line whole is written without reading the line first."""


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a CPU tensor, row major, uint8 ``[n]``; shares its memory if the tensor is contiguous."""
    import torch

    bytes_: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes_  # type: ignore[no-any-return]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new CPU tensor with arbitrary contents, aligned to a cache line, in large pages where the system has them."""
    import torch

    return torch.from_numpy(aligned_bytes(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def aligned_bytes(count: int) -> npt.NDArray[np.uint8]:
    """The memory of such a tensor."""
    room = np.empty(count + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + count]
