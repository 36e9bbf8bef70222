"""One stored tensor: what its numbers are, how many, and where its bytes lie.

A record is made of such parts, whether it comes from a file, from a quantiser or from somebody's tensors.  The bytes
stay where they are, at whatever address; numpy sees them as bytes, and a typed torch tensor is made when one is asked
for: a view where the address allows it, else a copy.  Bytes on the CPU need no torch, which takes 1.3 s and 190 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import FormatError, UnsupportedError
from uqff.schema.bricks import Placeholder, Scope
from uqff.schema.buffers import as_array

if TYPE_CHECKING:
    import torch

__all__ = ["Bytes", "Part", "StoredTensor", "concatenated", "joined", "stacked"]

Bytes: TypeAlias = "npt.NDArray[np.uint8] | torch.Tensor"
"""uint8 of some shape: numpy's on the CPU, torch's elsewhere."""

COMPARED = 1 << 22
"""Bytes that are compared together: a weight may have billions."""


@dataclass(frozen=True, eq=False, repr=False)
class Part:
    """A stored tensor.

    Attributes:
        dtype: of its elements.
        shape: dimensions in elements.
        data: its bytes, row major and little endian: a memoryview of bytes at any address; a
            :class:`~uqff.schema.bricks.Placeholder` where there are none yet; of another device than the CPU, a flat
            torch tensor of uint8.  Any other buffer may be given and is kept as a view.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: Any

    def __post_init__(self) -> None:
        if not isinstance(self.data, (memoryview, Placeholder)) and not _is_tensor(self.data):
            object.__setattr__(self, "data", memoryview(self.data).cast("B"))

    @classmethod
    def of_fields(cls, record: Scope) -> Part:
        """The part that a parsed tensor record R describes; shares its bytes."""
        return cls(record["dtype"], tuple(record["shape"]), record["data"])

    @classmethod
    def of_array(cls, array: npt.NDArray[Any], dtype: DType) -> Part:
        """The part that an array holds; shares its memory if it is C-contiguous.

        Args:
            array: of numbers as large as those of ``dtype``, whose bits they have.
            dtype: what they are.
        """
        return cls(dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor, *, name: str | None = None) -> Part:
        """The part that a torch tensor holds; shares its memory if it is contiguous.

        Args:
            tensor: on any device; on the meta device, only its size counts.
            name: of the field, for errors.

        Raises:
            UnsupportedError: a dtype that the format has no code for.
        """
        import torch

        dtype, shape = DType.of_torch(tensor.dtype), tuple(tensor.shape)
        if dtype is None:
            allowed = ", ".join(d.name for d in DType if d.storable)
            raise UnsupportedError("dtype has no code in the format", field=name, expected=allowed, got=tensor.dtype)
        if tensor.is_meta:
            return cls.planned(shape, dtype)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return cls(dtype, shape, flat.numpy().data if flat.device.type == "cpu" else flat)

    @classmethod
    def planned(cls, shape: Sequence[int], dtype: DType) -> Part:
        """A part that has no bytes yet."""
        return cls(dtype, tuple(shape), Placeholder(math.prod(shape) * dtype.itemsize))

    def fields(self, dtype: DType | None = None) -> dict[str, Any]:
        """The fields of a tensor record R.

        Args:
            dtype: the stored dtype, if the part holds the bytes of another: of its last dimension.
        """
        shape = self.shape
        if dtype is not None:
            shape = (*shape[:-1], shape[-1] * self.dtype.itemsize // dtype.itemsize)
        return {"dtype": dtype or self.dtype, "shape": shape, "data": self.payload}

    @property
    def payload(self) -> Any:
        """The bytes as they are written: a memoryview, a copy if they are on another device; or a placeholder."""
        return self.data.cpu().numpy().data if _is_tensor(self.data) else self.data

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return int(self.data.nbytes)

    @property
    def is_planned(self) -> bool:
        """Whether there are no bytes yet: torch calls that the meta device."""
        return isinstance(self.data, Placeholder)

    @property
    def place(self) -> str:
        """Where the bytes are, in torch's words: ``cpu``, ``meta``, ``cuda:0``, ..."""
        if self.is_planned:
            return "meta"
        return str(self.data.device) if _is_tensor(self.data) else "cpu"

    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, uint8 ``[nbytes]``; a view, not to be written to; a copy if they are on another device.

        The array counts as writable: numba tells read-only ones apart, and would compile kernels again for them.

        Raises:
            FormatError: there are no bytes yet.
        """
        if isinstance(self.data, Placeholder):
            raise FormatError("payload has no bytes: it is on the meta device")
        if _is_tensor(self.data):
            made: npt.NDArray[np.uint8] = self.data.cpu().numpy()
            return made
        return as_array(self.data)

    def tensor(self) -> torch.Tensor:
        """The typed torch tensor: a view if the bytes are aligned, else a copy."""
        import torch

        if self.is_planned:
            return torch.empty(self.shape, dtype=self.dtype.torch, device="meta")
        flat: torch.Tensor = self.data if _is_tensor(self.data) else torch.from_numpy(self.array())
        itemsize = self.dtype.itemsize
        if flat.data_ptr() % itemsize or flat.storage_offset() % itemsize:
            flat = flat.clone()
        return flat.view(self.dtype.torch).view(self.shape)

    def rows(self) -> Bytes:
        """The bytes, uint8 ``[..., last × itemsize]``; a view."""
        *outer, last = self.shape or (1,)
        flat: Bytes = self.data if _is_tensor(self.data) else self.array()
        return flat.reshape(*outer, last * self.dtype.itemsize)

    def words(self, dtype: DType) -> Any:
        """The bytes as integers of another dtype, ``[..., last]``: numpy's on the CPU, torch's elsewhere.

        A view, a copy if they are not aligned.
        """
        rows = self.rows()
        if isinstance(rows, np.ndarray):
            code = np.dtype(dtype.torch_name)
            return rows.view(code) if rows.ctypes.data % dtype.itemsize == 0 else rows.copy().view(code)
        return Part(dtype, (*rows.shape[:-1], rows.shape[-1] // dtype.itemsize), rows.reshape(-1)).tensor()

    def like(self, rows: Bytes) -> Part:
        """Other bytes ``[..., last × itemsize]`` as a part of the same dtype; copied if they are not contiguous."""
        *outer, last = rows.shape
        return Part(self.dtype, (*outer, last // self.dtype.itemsize), _flat(rows))

    def as_bytes(self) -> Part:
        """The same bytes as a part of U8 ``[..., last × itemsize]``."""
        *outer, last = self.shape or (1,)
        return Part(DType.U8, (*outer, last * self.dtype.itemsize), self.data)

    def view(self, shape: Sequence[int]) -> Part:
        """The same bytes in another shape of as many elements."""
        return Part(self.dtype, tuple(shape), self.data)

    def narrow(self, dim: int, start: int, length: int) -> Part:
        """A range along a dimension: a view if it is contiguous, else a copy of that range alone.

        Args:
            dim: not negative.
            start: first element.
            length: number of elements.
        """
        if self.is_planned:
            return self.planned((*self.shape[:dim], length, *self.shape[dim + 1 :]), self.dtype)
        unit = self.dtype.itemsize if dim == len(self.shape) - 1 else 1
        chosen = slice(start * unit, (start + length) * unit)
        return self.like(self.rows()[(slice(None),) * dim + (chosen,)])

    def transposed(self) -> Part:
        """The part with its last two dimensions exchanged, in new memory."""
        *outer, rows, columns = self.shape
        shape = (*outer, columns, rows)
        if self.is_planned:
            return self.planned(shape, self.dtype)
        flat: Any = self.data if _is_tensor(self.data) else self.array()
        elements = flat.reshape(*outer, rows, columns, self.dtype.itemsize).swapaxes(-3, -2)
        return Part(self.dtype, shape, _flat(elements))

    def pick(self, index: npt.NDArray[np.int64]) -> Part:
        """Elements of a part with one dimension longer than 1, in the order of ``index``; neighbours are a view."""
        dim = max(range(len(self.shape)), key=lambda i: self.shape[i])
        first, count = int(index[0]), len(index)
        if int(index[-1]) - first == count - 1 and bool((np.diff(index) == 1).all()):
            return self.narrow(dim, first, count)
        shape = tuple(count if i == dim else 1 for i in range(len(self.shape)))
        if self.is_planned:
            return self.planned(shape, self.dtype)
        elements = self.rows().reshape(-1, self.dtype.itemsize)
        if isinstance(elements, np.ndarray):
            return Part(self.dtype, shape, _flat(elements[index]))
        import torch

        return Part(self.dtype, shape, _flat(elements[torch.from_numpy(index).to(elements.device)]))

    def to(self, device: torch.device) -> Part:
        """The part on a device; itself if it is there."""
        if self.place == str(device):
            return self
        if device.type == "meta":
            return self.planned(self.shape, self.dtype)
        import torch

        if self.is_planned:
            return Part.of_tensor(self.tensor().to(device))  # which torch refuses
        flat = self.data if _is_tensor(self.data) else torch.from_numpy(self.array())
        moved = flat.to(device)
        return Part(self.dtype, self.shape, moved.numpy().data if device.type == "cpu" else moved)

    def same_as(self, other: object) -> bool:
        """Whether another part has the same dtype, shape and bits, wherever it is; one without bytes is only itself."""
        if self is other:
            return True
        if not isinstance(other, Part) or (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        if self.is_planned or other.is_planned:
            return False
        a, b = self.array(), other.array()
        return len(a) == len(b) and all(
            np.array_equal(a[at : at + COMPARED], b[at : at + COMPARED]) for at in range(0, len(a), COMPARED)
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of these bytes."""
        if _is_tensor(self.data):
            return bool(self.data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr())
        start = 0 if self.is_planned else self.array().ctypes.data
        return self.place == tensor.device.type and start <= tensor.data_ptr() < start + self.nbytes

    def __repr__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"

    def __reduce__(self) -> tuple[Any, ...]:
        data = bytes(self.data) if isinstance(self.data, memoryview) else self.data
        return Part, (self.dtype, self.shape, data)


class StoredTensor:
    """A field of a record: set to a part or a torch tensor, kept as a :class:`Part`, read as a torch tensor.

    :class:`~uqff.families.base.QuantizedTensor` puts it in the place of every field of type ``torch.Tensor``.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, record: None, owner: type) -> StoredTensor: ...

    @overload
    def __get__(self, record: object, owner: type) -> torch.Tensor: ...

    def __get__(self, record: object | None, owner: type) -> StoredTensor | torch.Tensor:
        if record is None:
            raise AttributeError(self._name)  # a dataclass would take anything else for a default
        part: Part = record.__dict__[self._name]
        return part.tensor()

    def __set__(self, record: object, value: torch.Tensor | Part) -> None:
        record.__dict__[self._name] = value if isinstance(value, Part) else Part.of_tensor(value, name=self._name)


def joined(parts: Sequence[Part], dim: int) -> Part:
    """Parts of one dtype put together along a dimension; the inverse of :meth:`Part.narrow`."""
    first = parts[0]
    if any(part.is_planned for part in parts):
        size = sum(part.shape[dim] for part in parts)
        return first.planned((*first.shape[:dim], size, *first.shape[dim + 1 :]), first.dtype)
    return first.like(concatenated([part.rows() for part in parts], dim))


def stacked(parts: Sequence[Part]) -> Part:
    """Parts of one dtype and shape with a new dimension in front of them."""
    return joined([part.view((1, *part.shape)) for part in parts], 0)


def concatenated(arrays: Sequence[Any], dim: int = 0) -> Any:
    """Arrays along a dimension: numpy's on the CPU, torch's elsewhere."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, dim)
    import torch

    return torch.cat(list(arrays), dim)


def _flat(rows: Bytes) -> Any:
    if isinstance(rows, np.ndarray):
        return np.ascontiguousarray(rows).reshape(-1).data
    return rows.contiguous().reshape(-1)


def _is_tensor(data: Any) -> bool:
    """Whether bytes are a torch tensor; known without torch."""
    return hasattr(data, "data_ptr")
