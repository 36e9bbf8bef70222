"""The border between buffers and tensors: views where alignment allows, copies of small parts where it does not.

A view shares memory with the buffer it came from and keeps it alive.  Never write to a view of a read-only buffer.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from uqff.schema.bricks import Placeholder

if TYPE_CHECKING:
    import torch

__all__ = ["as_array", "bytes_of", "flat_bytes", "writable_alias"]


def writable_alias(buffer: Any) -> memoryview:
    """A flat memoryview of ``buffer`` that torch accepts without a warning, sharing its memory.

    torch has no read-only tensors and warns about every view of read-only memory; the alias only drops the flag.
    """
    view = memoryview(buffer).cast("B")
    if not view.readonly or not len(view):
        return view
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    alias = (ctypes.c_ubyte * len(view)).from_address(address)
    alias.owner = view  # type: ignore[attr-defined]  # keeps the memory alive as long as the alias
    return memoryview(alias).cast("B")


def as_array(buffer: Any) -> npt.NDArray[np.uint8]:
    """The bytes of a buffer, uint8 ``[n]``, sharing its memory; not to be written to.

    The array counts as writable: numba tells read-only ones apart, and would compile kernels again for them.
    """
    return np.frombuffer(writable_alias(buffer), np.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row major; a view if the tensor is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def flat_bytes(data: memoryview | Placeholder) -> torch.Tensor:
    """All of ``data`` as uint8 ``[n]``, sharing its memory; on the meta device if there is none."""
    import torch

    if isinstance(data, Placeholder):
        return torch.empty(data.nbytes, dtype=torch.uint8, device="meta")
    return torch.from_numpy(np.frombuffer(data, np.uint8))
