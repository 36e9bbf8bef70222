"""Typed parts of a record that a file may hold at an unaligned address.

A blob has no padding, so a float32 part often begins at an odd address.  Such a part stays a view of the file's bytes,
and the typed tensor is made (copied) when it is asked for: a layer that nobody uses costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, overload

from uqff.codes import DType

if TYPE_CHECKING:
    import torch

__all__ = [
    "Part",
    "StoredTensor",
    "aligned",
    "flat_part",
    "joined",
    "lazily_typed",
    "narrowed",
    "own",
    "picked",
    "stacked",
    "typed",
    "unstacked",
]

_Record = TypeVar("_Record", bound=type)


def typed(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Bytes as numbers: uint8 ``[..., last × itemsize]`` to ``[..., last]``; copied only if they are not aligned."""
    return aligned(data, dtype.itemsize).view(dtype.torch)


def aligned(data: torch.Tensor, itemsize: int) -> torch.Tensor:
    """Contiguous bytes at an address, and an offset in their storage, that numbers of ``itemsize`` bytes may have."""
    return data.clone() if data.data_ptr() % itemsize or data.storage_offset() % itemsize else data


@dataclass(frozen=True, eq=False)
class Part:
    """The bytes of a tensor whose address is no multiple of its item size.

    Attributes:
        data: uint8 ``[nbytes]``.
        dtype: what the bytes are.
        shape: dimensions in elements.
    """

    data: torch.Tensor
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.data.nbytes

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.data.device

    def tensor(self) -> torch.Tensor:
        """The typed tensor: a copy."""
        return typed(self.data, self.dtype).view(self.shape)


class StoredTensor:
    """A field of a record that is set to a tensor or a :class:`Part` and always read as a tensor."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, record: None, owner: type) -> StoredTensor: ...

    @overload
    def __get__(self, record: object, owner: type) -> torch.Tensor: ...

    def __get__(self, record: object | None, owner: type) -> StoredTensor | torch.Tensor:
        if record is None:
            return self
        part: torch.Tensor | Part = record.__dict__[self._name]
        return part.tensor() if isinstance(part, Part) else part

    def __set__(self, record: object, value: torch.Tensor | Part) -> None:
        record.__dict__[self._name] = value


def lazily_typed(*names: str) -> Callable[[_Record], _Record]:
    """Turn fields of a dataclass into :class:`StoredTensor` fields; applied after ``@dataclass``."""

    def decorate(record: _Record) -> _Record:
        for name in names:
            setattr(record, name, StoredTensor(name))
        return record

    return decorate


def flat_part(part: torch.Tensor | Part) -> torch.Tensor:
    """The bytes of a part, uint8 ``[..., last × itemsize]``; a view if the part is contiguous."""
    import torch

    if not isinstance(part, Part):
        part = part.contiguous()
        return (part if part.ndim else part.reshape(1)).view(torch.uint8)
    *outer, last = part.shape
    return part.data.view(*outer, last * part.dtype.itemsize)


def _like(part: torch.Tensor | Part, data: torch.Tensor) -> torch.Tensor | Part:
    """Bytes uint8 ``[..., last × itemsize]`` as a part of the dtype of ``part``; never copied."""
    if not isinstance(part, Part):
        itemsize, dtype = part.dtype.itemsize, part.dtype
    else:
        itemsize, dtype = part.dtype.itemsize, part.dtype.torch
    if data.is_meta or data.data_ptr() % itemsize == 0:
        return data.view(dtype)
    *outer, last = data.shape
    assert isinstance(part, Part)  # a slice of an aligned tensor is aligned
    return Part(data.view(-1), part.dtype, (*outer, last // itemsize))


def narrowed(part: torch.Tensor | Part, dim: int, start: int, length: int) -> torch.Tensor | Part:
    """A range of a part: a view if it is contiguous, else a copy of that range alone.

    Args:
        part: of at least one dimension.
        dim: not negative.
        start: first element.
        length: number of elements.
    """
    itemsize = part.dtype.itemsize if dim == len(part.shape) - 1 else 1
    return _like(part, own(flat_part(part).narrow(dim, start * itemsize, length * itemsize).contiguous()))


def own(data: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own: a view of a storage that ends where the bytes end.

    torch copies, pickles and aligns by storages, and the storage of a plain slice is that of the whole.

    Args:
        data: contiguous uint8.
    """
    import torch

    return torch.from_numpy(data.numpy()) if data.device.type == "cpu" else data


def picked(part: torch.Tensor | Part, index: torch.Tensor) -> torch.Tensor | Part:
    """Elements of a part with one dimension longer than 1, in the order of ``index``; a view if they are neighbours."""
    dim = max(range(len(part.shape)), key=lambda i: part.shape[i])
    first, count = int(index[0]), len(index)
    if int(index[-1]) - first == count - 1 and bool((index.diff() == 1).all()):
        return narrowed(part, dim, first, count)
    elements = flat_part(part).view(-1, part.dtype.itemsize)[index.to(part.device)]
    shape = tuple(count if i == dim else 1 for i in range(len(part.shape)))
    return _like(part, elements.view(*shape[:-1], -1))


def joined(parts: Sequence[torch.Tensor | Part], dim: int) -> torch.Tensor | Part:
    """Parts of one dtype put together along a dimension; the inverse of :func:`narrowed`."""
    import torch

    return _like(parts[0], torch.cat([flat_part(part) for part in parts], dim))


def stacked(parts: Sequence[torch.Tensor | Part]) -> torch.Tensor | Part:
    """Parts of one dtype and shape, at least one dimension, with a new dimension in front of them."""
    import torch

    return _like(parts[0], torch.stack([flat_part(part) for part in parts]))


def unstacked(part: torch.Tensor | Part) -> torch.Tensor | Part:
    """A part whose first dimension is 1, without it; a view."""
    return Part(part.data, part.dtype, part.shape[1:]) if isinstance(part, Part) else part.view(part.shape[1:])
