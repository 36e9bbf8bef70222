"""A weight as a value: the parts that are stored and what follows from them alone."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from uqff.families.part import Part, StoredTensor

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["Record"]


class Record(ABC):
    """Fields of a weight, frozen: its parts, and its parameters beside them.

    Subclasses are frozen dataclasses; their fields of type ``torch.Tensor`` are the parts, in file order.
    """

    def __init_subclass__(cls) -> None:
        for name, kind in inspect.get_annotations(cls).items():
            if "torch.Tensor" in (kind, f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}"):
                setattr(cls, name, StoredTensor(name))

    @classmethod
    def made_of(cls, **fields: Any) -> Self:
        """The record of its fields, the parts among them as :class:`Part`, of which type checkers do not know."""
        return cls(**fields)

    @property
    @abstractmethod
    def kind(self) -> str:
        """The type's short name, as in-situ quantisation options spell it: ``q4k``, ``hqq4``, ``fp8``, ``afq3``, ..."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical dimensions of the weight, in elements: ``(out, in)`` or ``(experts, out, in)``."""

    @property
    def parts(self) -> dict[str, Part]:
        """What is stored, by attribute name, in file order."""
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Part)}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, without framing and bias."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def place(self) -> str:
        """Where the stored tensors are, in torch's words: ``cpu``, ``meta``, ``cuda:0``, ..."""
        return next(iter(self.parts.values())).place

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        import torch

        return torch.device(self.place)

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on ``device``; the record itself if they are there already."""
        import torch

        target = torch.empty(0, device=device).device
        if all(part.place == str(target) for part in self.parts.values()):
            return self
        return self.replaced(**{name: part.to(target) for name, part in self.parts.items()})

    def meta(self) -> Self:
        """The record without its bytes, which torch calls the meta device: all sizes are known."""
        return self.replaced(**{name: part.planned(part.shape, part.dtype) for name, part in self.parts.items()})

    def replaced(self, **changes: Any) -> Self:
        """The record with other fields; :func:`dataclasses.replace` would make torch tensors of those that stay."""
        return type(self)(**self.__dict__ | changes)

    def same_in(self, other: Record, name: str) -> bool:
        """Whether a field is the same in another record of the class, to the last bit."""
        mine, theirs = self.__dict__[name], other.__dict__[name]
        return mine.same_as(theirs) if isinstance(mine, Part) else bool(mine == theirs)

    def __eq__(self, other: object) -> bool:
        """Equality by bytes: same family, same parameters, same bits in every stored tensor."""
        if not isinstance(other, Record) or type(other) is not type(self):
            return NotImplemented
        return all(self.same_in(other, name) for name in self.__dict__)

    __hash__ = None  # type: ignore[assignment]  # compared by content that may be gigabytes

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.numel, 1)
        return (
            f"<{type(self).__name__} {self.kind} {list(self.shape)}, "
            f"{self.nbytes:,} bytes, {bits:.2f} bits/weight, {self.place}>"
        )
