"""A layer of a model: a quantised weight, and its bias if it has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, overload

from uqff.families.base import QuantizedTensor
from uqff.families.part import Part
from uqff.schema.bricks import Scope

if TYPE_CHECKING:
    import torch

__all__ = ["Layer", "Sharding", "Writable"]


class Sharding(Protocol):
    """Something that knows which slice of a weight it wants, like :class:`uqff.parallel.Shard`."""

    def apply_to(self, weight: Layer) -> Layer:
        """The slice of a layer, still quantised."""

    def slice_of(self, weight: QuantizedTensor) -> tuple[int, int, int]:
        """The slice of a weight, which may have no bytes: dimension, start, length."""


class _Bias:
    """The field of a bias: set to a part, a torch tensor or None, kept as a part, read as a torch tensor."""

    @overload
    def __get__(self, layer: None, owner: type) -> None: ...

    @overload
    def __get__(self, layer: Layer, owner: type) -> torch.Tensor | None: ...

    def __get__(self, layer: Layer | None, owner: type) -> torch.Tensor | None:
        part = None if layer is None else layer.bias_part
        return None if part is None else part.tensor()

    def __set__(self, layer: Layer, value: torch.Tensor | Part | None) -> None:
        made = value if value is None or isinstance(value, Part) else Part.of_tensor(value, name="bias")
        layer.__dict__["bias"] = made


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """What a blob or the entries of a key hold; unpacks as ``weight, bias = layer``.

    Attributes:
        weight: the quantised weight.
        bias: ``[out]`` in the dtype it is stored in, or None; a view where its address allows it.
    """

    weight: QuantizedTensor
    bias: _Bias = _Bias()

    @property
    def bias_part(self) -> Part | None:
        """The bias as it is stored; does not import torch."""
        part: Part | None = self.__dict__["bias"]
        return part

    @classmethod
    def of(cls, weight: Writable, bias: torch.Tensor | None = None) -> Layer:
        """A weight, or a layer, whose bias is then the default."""
        if isinstance(weight, Layer):
            return weight if bias is None else cls(weight.weight, bias)
        return cls(weight, bias)

    @classmethod
    def of_fields(cls, record: type[QuantizedTensor], fields: Scope) -> Layer:
        """The layer of all fields of a blob, or of the entries of 1.x; its parts are views of them."""
        bias = fields["bias"]
        return cls(record.parse(fields), None if bias is None else Part.of_fields(bias))

    def narrow(self, dim: int, start: int, length: int) -> Layer:
        """The layer of a slice of the weight; see :meth:`QuantizedTensor.narrow`.

        The bias goes with the outputs and experts it belongs to.  A slice of the inputs keeps it whole: it is to be
        added once, to the sum of the partial products.
        """
        weight, bias = self.weight.narrow(dim, start, length), self.bias_part
        if bias is None:
            return Layer(weight)
        rank = len(self.weight.shape)
        axis = dim % rank - (rank - 1 - len(bias.shape))  # of the bias, whose dimensions end where the inputs begin
        return Layer(weight, bias.narrow(axis, start, length) if 0 <= axis < len(bias.shape) else bias)

    def unstack(self) -> list[Layer]:
        """The layers of stacked experts; a bias that they have in common is the bias of each.

        Raises:
            ShardError: see :meth:`QuantizedTensor.unstack`.
        """
        weights, bias = self.weight.unstack(), self.bias_part
        if bias is None or len(bias.shape) != len(self.weight.shape) - 1:
            return [Layer(weight, bias) for weight in weights]
        return [Layer(weight, bias.narrow(0, at, 1).view(bias.shape[1:])) for at, weight in enumerate(weights)]

    def meta(self) -> Layer:
        """The layer without its bytes: all sizes are known."""
        bias = self.bias_part
        return Layer(self.weight.meta(), None if bias is None else bias.planned(bias.shape, bias.dtype))

    def __iter__(self) -> Iterator[Any]:
        yield self.weight
        yield self.bias

    def __eq__(self, other: object) -> bool:
        """Equality by bytes, of weight and bias."""
        if not isinstance(other, Layer):
            return NotImplemented
        mine, theirs = self.bias_part, other.bias_part
        same = theirs is None if mine is None else mine.same_as(theirs)
        return same and self.weight == other.weight

    __hash__ = None  # type: ignore[assignment]  # compared by content that may be gigabytes

    def __repr__(self) -> str:
        return f"Layer(weight={self.weight!r}, bias={self.bias_part!r})"


Writable: TypeAlias = QuantizedTensor | Layer
"""What can be written."""
