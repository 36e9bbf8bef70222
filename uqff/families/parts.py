"""Typed parts of a record that a file may hold at an unaligned address.

A blob has no padding, so a float32 part often begins at an odd address.  Such a part stays a view of the file's bytes,
and the typed tensor is made (copied) when it is asked for: a layer that nobody uses costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, overload

from uqff.codes import DType

if TYPE_CHECKING:
    import torch

__all__ = ["Part", "StoredTensor", "aligned", "lazily_typed", "typed"]

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
