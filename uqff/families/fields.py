"""Between the fields of a layout and tensors: a plain tensor in a format is ``{"dtype", "shape", "data"}``.

Payloads are buffers, or :class:`~uqff.schema.bricks.Placeholder` where there is none yet; torch has the meta device for
those.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import UnsupportedError
from uqff.families.parts import Part
from uqff.schema.bricks import Placeholder, Scope
from uqff.schema.buffers import bytes_of, flat_bytes, tensor_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "array_fields",
    "bytes_part",
    "payload",
    "planned_fields",
    "raw_bytes",
    "stored",
    "stored_part",
    "tensor_fields",
    "tensor_part",
]


def array_fields(array: npt.NDArray[Any], dtype: DType) -> dict[str, Any]:
    """The fields of a tensor record R; shares memory with an array that is C-contiguous.

    Args:
        array: of numbers as large as those of ``dtype``, whose bits they have.
        dtype: what they are.
    """
    return {"dtype": dtype, "shape": array.shape, "data": np.ascontiguousarray(array).reshape(-1).view(np.uint8).data}


def planned_fields(shape: tuple[int, ...], dtype: DType) -> dict[str, Any]:
    """The fields of a tensor record R that has no payload yet."""
    return {"dtype": dtype, "shape": shape, "data": Placeholder(math.prod(shape) * dtype.itemsize)}


def stored(tensor: torch.Tensor, *, name: str) -> DType:
    """The format's dtype of a torch tensor.

    Raises:
        UnsupportedError: for a dtype that has no code.
    """
    dtype = DType.of_torch(tensor.dtype)
    if dtype is None:
        allowed = ", ".join(d.name for d in DType if d.storable)
        raise UnsupportedError("dtype has no code in the format", field=name, expected=allowed, got=tensor.dtype)
    return dtype


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The little-endian bytes of a tensor, uint8 ``[..., last × itemsize]``; a view if it is contiguous."""
    import torch

    tensor = tensor.contiguous()
    return (tensor if tensor.ndim else tensor.reshape(1)).view(torch.uint8)


def tensor_part(record: Scope) -> torch.Tensor:
    """A parsed tensor record as a typed tensor: for small parts, which are copied if they are not aligned."""
    return tensor_of(record["data"], record["dtype"], record["shape"])


def stored_part(record: Scope) -> torch.Tensor | Part:
    """A parsed tensor record for a :class:`StoredTensor` field: never copied; typed if it is aligned."""
    data = flat_bytes(record["data"])
    if data.data_ptr() % record["dtype"].itemsize:
        return Part(data, record["dtype"], record["shape"])
    return data.view(record["dtype"].torch).view(record["shape"])


def bytes_part(record: Scope) -> torch.Tensor:
    """A parsed tensor record as its bytes, uint8 ``[..., last × itemsize]``: for payloads, which are never copied."""
    *outer, last = record["shape"]
    return tensor_of(record["data"], DType.U8, (*outer, last * record["dtype"].itemsize))


def tensor_fields(
    tensor: torch.Tensor | Part, *, name: str, dtype: DType | None = None, shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The fields of a tensor record R.

    Args:
        tensor: the tensor; on the meta device, only its size counts. A part is not made a tensor.
        name: field name, for errors.
        dtype: the stored dtype, if the tensor holds raw bytes of another.
        shape: the stored shape, likewise.
    """
    if isinstance(tensor, Part):
        return {"dtype": tensor.dtype, "shape": tensor.shape, "data": payload(tensor.data)}
    return {
        "dtype": dtype or stored(tensor, name=name),
        "shape": tuple(tensor.shape) if shape is None else shape,
        "data": payload(tensor),
    }


def payload(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, or a placeholder of their number if it has none (meta device)."""
    return Placeholder(tensor.nbytes) if tensor.is_meta else bytes_of(tensor.cpu())
