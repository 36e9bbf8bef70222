"""Which slice of a weight a rank holds: pure arithmetic over logical dimensions.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/safetensors.rs`` (``Shard``, ``Shard::apply_to``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload

from uqff.errors import ShardError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from uqff.codec.layer import Layer
    from uqff.families.base import QuantizedTensor

__all__ = ["Shard", "Slice", "listed_world_sizes", "world_sizes"]

_Weight = TypeVar("_Weight", bound="QuantizedTensor")

LARGEST = 2**64 - 1
"""Sizes are 64-bit where shards are computed by the engine; no offset, length or rank is above."""

LISTED = 12
"""World sizes that an error message lists."""


class Slice(NamedTuple):
    """A range of one dimension, in elements: what ``narrow`` takes."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Shard:
    """A part of a weight, before the weight's shape is known. Made by :meth:`simple` or :meth:`offset`.

    Attributes:
        dim: logical dimension that is cut.
        rank: which of the equal parts; None for a range.
        world_size: number of equal parts; None for a range.
        start: first element of a range; None for an equal part.
        length: elements of a range; None for an equal part.

    Example:
        >>> import torch
        >>> shard = uqff.parallel.Shard.simple(0, rank=1, world_size=4)
        >>> shard.resolve([32, 64])
        Slice(dim=0, start=8, length=8)
        >>> shard.apply_to(uqff.quantize(torch.ones(32, 64), "q8_0")).shape
        (8, 64)
        >>> uqff.parallel.Shard.offset(1, 0, 32).resolve([32, 64])
        Slice(dim=1, start=0, length=32)
    """

    dim: int
    rank: int | None = None
    world_size: int | None = None
    start: int | None = None
    length: int | None = None

    @classmethod
    def simple(cls, dim: int, rank: int, world_size: int) -> Shard:
        """Part ``rank`` of ``world_size`` equal parts of dimension ``dim``."""
        return cls(dim, rank=rank, world_size=world_size)

    @classmethod
    def offset(cls, dim: int, offset: int, length: int) -> Shard:
        """Elements ``offset`` to ``offset + length`` of dimension ``dim``."""
        return cls(dim, start=offset, length=length)

    @classmethod
    def whole(cls) -> Shard:
        """Everything."""
        return cls.simple(0, 0, 1)

    @classmethod
    def of(cls, given: object, *, layer: str | None = None) -> Shard:
        """A shard that somebody gives.

        Raises:
            UnsupportedError: it is none.
        """
        if isinstance(given, cls):
            return given
        raise UnsupportedError("not a shard", layer=layer, expected="a uqff.parallel.Shard", got=type(given).__name__)

    def resolve(self, shape: Sequence[int], *, alignment: int = 1, layer: str | None = None) -> Slice:
        """The range of elements in a weight of that shape.

        Args:
            shape: logical dimensions.
            alignment: multiples at which the dimension can be cut; its end is allowed too.
            layer: key of the layer, for errors.

        Raises:
            ShardError: no such dimension, a world of 0, a rank outside the world, a dimension that is not divisible, a
                range beyond the dimension, an overflow, or a cut that is not aligned. World sizes that work are named.
        """
        if not 0 <= self.dim < len(shape):
            raise ShardError(
                "no such dimension",
                layer=layer,
                expected=f"0 to {len(shape) - 1} for shape {list(shape)}",
                got=self.dim,
            )
        size = shape[self.dim]
        slice_ = self._equal_part(size, alignment, layer) if self.rank is not None else self._range(size, layer)
        end = slice_.start + slice_.length
        if slice_.start % alignment or (end % alignment and end != size):
            raise self.misaligned(size, alignment, layer)
        return slice_

    def _equal_part(self, size: int, alignment: int, layer: str | None) -> Slice:
        rank, world_size = self.rank, self.world_size
        if rank is None or world_size is None:
            raise ShardError("shard is neither part nor range", layer=layer, got=self)
        if world_size < 1:
            raise ShardError("world without ranks", layer=layer, expected="a world size of at least 1", got=world_size)
        if not 0 <= rank < world_size:
            raise ShardError("rank outside the world", layer=layer, expected=f"0 to {world_size - 1}", got=rank)
        if size % world_size or not size:
            raise ShardError(
                "dimension is not divisible by the world size",
                layer=layer,
                expected=f"dimension {self.dim} of {size} in equal parts: {listed_world_sizes(size, alignment)}",
                got=f"world size {world_size}",
            )
        return Slice(self.dim, rank * (size // world_size), size // world_size)

    def _range(self, size: int, layer: str | None) -> Slice:
        start, length = self.start, self.length
        if start is None or length is None:
            raise ShardError("shard is neither part nor range", layer=layer, got=self)
        if start < 0 or length < 1:
            raise ShardError(
                "not a range", layer=layer, expected="an offset of at least 0, a length of at least 1", got=self
            )
        if start + length > LARGEST:
            raise ShardError("range overflows", layer=layer, expected="an end within 64 bits", got=start + length)
        if start + length > size:
            raise ShardError(
                "range beyond the dimension",
                layer=layer,
                expected=f"at most {size} along dimension {self.dim}",
                got=f"{start} to {start + length}",
            )
        return Slice(self.dim, start, length)

    def misaligned(self, size: int, alignment: int, layer: str | None = None) -> ShardError:
        """The error for a cut within a block or group."""
        if self.world_size is None:
            got = f"{self.start} to {(self.start or 0) + (self.length or 0)}"
        else:
            got = f"parts of {size // self.world_size}, world size {self.world_size}"
        works = listed_world_sizes(size, alignment)
        return ShardError(
            "slice cannot be cut exactly",
            layer=layer,
            expected=f"dimension {self.dim} of {size} in multiples of {alignment}: {works}",
            got=got,
        )

    @overload
    def apply_to(self, weight: Layer, *, layer: str | None = ...) -> Layer: ...
    @overload
    def apply_to(self, weight: torch.Tensor, *, layer: str | None = ...) -> torch.Tensor: ...
    @overload
    def apply_to(self, weight: _Weight, *, layer: str | None = ...) -> _Weight: ...

    def apply_to(
        self, weight: Layer | torch.Tensor | QuantizedTensor, *, layer: str | None = None
    ) -> Layer | torch.Tensor | QuantizedTensor:
        """The slice: of a plain tensor a view, of a record or layer what its ``narrow`` gives.

        Raises:
            ShardError: see :meth:`slice_of`.
        """
        from uqff.codec.layer import Layer

        record = weight.weight if isinstance(weight, Layer) else weight
        return weight.narrow(*self.slice_of(record, layer=layer))

    def slice_of(self, weight: torch.Tensor | QuantizedTensor, *, layer: str | None = None) -> Slice:
        """The range of elements in a weight, which can be cut there; touches no payload.

        Raises:
            ShardError: see :meth:`resolve`; also if the family cannot cut there.
        """
        from uqff.families.base import QuantizedTensor

        if not isinstance(weight, QuantizedTensor):
            return self.resolve(weight.shape, layer=layer)
        alignment = weight.alignment(self.dim) if 0 <= self.dim < len(weight.shape) else 1
        slice_ = self._located(weight.shape, alignment, layer)
        if slice_.length != weight.shape[self.dim] and not weight.can_narrow(*slice_):
            raise self.misaligned(weight.shape[self.dim], alignment, layer)
        return slice_

    def _located(self, shape: Sequence[int], alignment: int, layer: str | None) -> Slice:
        """:meth:`resolve` without the rule of alignment, which only enters the messages."""
        if self.rank is not None and 0 <= self.dim < len(shape):
            return self._equal_part(shape[self.dim], alignment, layer)
        return self.resolve(shape, layer=layer)


def chunk_ranges(shape: Sequence[int], chunks: int | Sequence[int], *, layer: str | None = None) -> list[Slice]:
    """The chunks of a fused weight, one after another along the outputs.

    Args:
        shape: of the weight.
        chunks: number of equal chunks, or the outputs of each.
        layer: key of the layer, for errors.

    Raises:
        ShardError: there are none, or they do not make up the weight.
    """
    outputs = shape[0]
    if isinstance(chunks, int):
        Shard.simple(0, 0, chunks).resolve(shape, layer=layer)
        chunks = [outputs // chunks] * chunks
    if sum(chunks) != outputs:
        raise ShardError("chunks do not make up the weight", layer=layer, expected=outputs, got=sum(chunks))
    starts = accumulate(chunks, initial=0)
    return [Shard.offset(0, *place).resolve(shape, layer=layer) for place in zip(starts, chunks, strict=False)]


def world_sizes(size: int, alignment: int = 1) -> list[int]:
    """The numbers of equal, aligned parts that a dimension can be cut into, ascending; 1 is always among them."""
    units = size // alignment if size % alignment == 0 else 0
    small = [n for n in range(1, int(units**0.5) + 1) if units % n == 0]
    return sorted({1, *small, *(units // n for n in small)})


def listed_world_sizes(size: int, alignment: int) -> str:
    """:func:`world_sizes` in words, for errors."""
    sizes = world_sizes(size, alignment)
    listed = ", ".join(map(str, sizes[:LISTED])) + (", ..." if len(sizes) > LISTED else "")
    return f"world sizes that work are {listed}"
