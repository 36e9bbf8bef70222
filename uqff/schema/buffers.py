"""The border between buffers and tensors: views where alignment allows, copies of small parts where it does not.

A view shares memory with the buffer it came from and keeps it alive.  Never write to a view of a read-only buffer.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.codes import DType
from uqff.schema.bricks import Placeholder

if TYPE_CHECKING:
    import torch

__all__ = ["bytes_of", "flat_bytes", "tensor_of", "writable_alias"]


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


def tensor_of(data: memoryview | Placeholder, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over ``data``: a view if the address is a multiple of the item size, else a copy.

    Args:
        data: the bytes of the tensor, exactly, from :func:`writable_alias`; or their number, for the meta device.
        dtype: dtype of the elements.
        shape: dimensions in elements.
    """
    flat = flat_bytes(data)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return (flat if dtype is DType.U8 else flat.view(dtype.torch)).view(shape)


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
